"""Values: what a task is asked to do, what came of it, and what can go wrong. Imports nothing of ours."""
