"""Measures this machine: what a task costs here, held against the barest program that does the same work."""
