"""Environments that are made for tasks."""
