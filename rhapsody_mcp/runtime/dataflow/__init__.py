"""Which tasks take the results of which, and in what places of a task."""
