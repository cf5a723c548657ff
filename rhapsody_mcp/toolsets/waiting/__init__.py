"""The tool `wait_tasks`: which tasks a call waits for, the wait, and its report."""
