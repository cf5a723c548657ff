"""What is shown of a result: plain data, rows of a table, a picture. It runs in a process for user code."""
