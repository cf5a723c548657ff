"""The parts of a node agent: hardware counts, launchers, and the processes of a task."""
