"""Connections between the nodes of an engine."""
