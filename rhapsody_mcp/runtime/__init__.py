"""Sessions: they route tasks to backends, pass results from task to task, and keep account."""
