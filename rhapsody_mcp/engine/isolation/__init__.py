"""Restores a worker's process after each function, so that no function sees changes of an earlier function."""
