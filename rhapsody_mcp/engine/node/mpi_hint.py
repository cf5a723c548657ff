"""Finds out whether a program that was started without MPI seems to use it."""

from __future__ import annotations

import os

from rhapsody_mcp.model.specs import Command, TaskSpec

__all__ = ["may_use_mpi"]

_SEARCHED_ARGUMENTS = 10
_SEARCHED_BYTES = 1024 * 1024


def may_use_mpi(spec: TaskSpec, cwd: str) -> bool:
    """Return whether the task is a job of independent ranks whose program, or a file among its arguments, mentions
    MPI. `cwd` is the session's folder."""
    work, layout = spec.work, spec.layout
    if not isinstance(work, Command) or layout.ranks < 2 or layout.pmi is not None:
        return False
    folder = os.path.join(cwd, layout.templates[0].cwd or "")
    names = [work.executable, *(argument for argument in work.arguments if isinstance(argument, str))]
    return any("mpi4py" in name or _mentions_mpi(os.path.join(folder, name)) for name in names[:_SEARCHED_ARGUMENTS])


def _mentions_mpi(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            beginning = file.read(_SEARCHED_BYTES)
    except (OSError, ValueError):  # not a readable file
        return False
    return b"mpi4py" in beginning or b"MPI_Init" in beginning
