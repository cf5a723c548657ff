"""A folder that is on `sys.path` only while a rank starts in a Python of the user."""
