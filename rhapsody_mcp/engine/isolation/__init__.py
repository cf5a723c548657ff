"""What keeps a function from finding what the one before it left in the worker."""
