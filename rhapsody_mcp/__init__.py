"""Run functions, executables, parallel jobs and prompts on an HPC machine, from Python or from an AI agent."""

from importlib.metadata import version

__version__ = version("rhapsody-mcp")
