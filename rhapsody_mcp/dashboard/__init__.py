"""What people see of a session: the page, the report, the picture of the task stream, the trace."""
