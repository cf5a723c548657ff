"""The tool `submit_tasks`: the tasks of one call are checked, accepted once, and reported."""
