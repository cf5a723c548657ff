"""The fault matrix: each row breaks one thing in the middle of a pipeline that real processes run.

`python -m pytest tests/faults -m ci` runs what fits into nine minutes, `python -m tests.faults` all of it, and
`python -m tests.faults.soak` breaks things at random for as long as it is told.
"""
