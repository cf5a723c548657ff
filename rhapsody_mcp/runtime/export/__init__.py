"""The export of a session: a script that repeats the session without the server, and a provenance record."""
