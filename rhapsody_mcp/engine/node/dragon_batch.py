"""Starts programs as functions of Dragon's Batch, whose scheduler decides when and where each runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from rhapsody_mcp.engine.node.launchers import LaunchedProcess, MarkedProcess, ProcessGroup, Program
from rhapsody_mcp.engine.process.tree import PROCESS_MARK

__all__ = ["BatchLauncher", "run_program"]


def run_program(arguments: list[str], env: dict[str, str], cwd: str) -> int:
    """Run a program to its end, and return its exit code. Batch runs this function.

    User functions run in the program, not in the Batch worker: a Batch worker blocks its Batch for ever if a function
    ends the worker, or returns a value that cannot be pickled.
    """
    import os
    import subprocess

    null = subprocess.DEVNULL
    return subprocess.call(arguments, env={**os.environ, **env}, cwd=cwd, stdin=null, stdout=null, stderr=null)


class BatchLauncher:
    """A launcher with a Batch of its own, which takes about four seconds to create."""

    sets_affinity = True

    def __init__(self) -> None:
        from dragon.workflows.batch import Batch

        self._batch = Batch(disable_telem=True)
        self._submitting = threading.Lock()

    def launch(self, program: Program) -> LaunchedProcess:
        with self._submitting:
            function = self._batch.options().function(run_program, program.arguments, program.env, os.getcwd())
        return MarkedProcess(program.env[PROCESS_MARK], function.get)

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        raise NotImplementedError("jobs do not go through Batch")
