"""Sessions: they send tasks to backends, pass results between tasks, and count what was used."""
