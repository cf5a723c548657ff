"""Runs one task in the process of the task: arguments, the call or program, output, result."""
