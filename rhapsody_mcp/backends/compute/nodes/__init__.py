"""Engines with several nodes."""
