"""Tests on a real Slurm cluster of simulated nodes: `python -m pytest tests/cluster`, as root."""
