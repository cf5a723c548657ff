"""The service of a user, which lives on between clients, and how clients and commands reach it."""
