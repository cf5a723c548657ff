"""What the user's code finds around it: another Python, packages, a container, lines that run before it."""
