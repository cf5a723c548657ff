"""A session where it is used: in the cells of a notebook, and in a terminal."""
