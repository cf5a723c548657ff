"""Processes of the operating system: found, ended and cleaned up after."""
