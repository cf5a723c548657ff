"""Functions and programs, in processes of an engine: what the Dragon and the local backend share."""
