"""The tool `submit_tasks`: its budget, the submission or the dry run, and the reply."""
