"""Agent frameworks as clients: real packages, each in an environment of its own, with a scripted model."""
