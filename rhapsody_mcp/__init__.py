"""Run functions, executables, parallel jobs and prompts on an HPC machine, from Python or from an AI agent."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: every task's process imports this package."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rhapsody-mcp")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
