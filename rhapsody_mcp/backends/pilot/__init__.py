"""Backends that run in an allocation of a scheduler: a proxy in the service, and the pilot on the first node."""
