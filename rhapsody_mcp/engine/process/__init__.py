"""Finds and ends processes of the operating system, and deletes what killed processes leave."""
