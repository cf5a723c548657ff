"""One program a framework: `python -m tests.frameworks.recipes.NAME COMMAND|URL`, which imports nothing of ours."""
