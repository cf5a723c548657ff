"""The benchmark: the cost of tasks on this machine, compared with the simplest programs that do the same work."""
