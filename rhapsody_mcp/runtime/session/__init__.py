"""One session: it accepts tasks, sends them to backends, and computes their statistics."""
