"""One task where it runs: its arguments, its function or program, its output and its result."""
