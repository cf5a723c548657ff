"""Scripts, recipes and provenance: what lets a person repeat a session without the server."""
