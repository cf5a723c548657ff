"""The scheduler of an HPC machine: allocations of nodes, asked for and watched."""
