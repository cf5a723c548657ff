"""Prepares the ranks of an MPI job that a step of the scheduler starts, on all nodes of the job at once."""

from __future__ import annotations

import os
import select
import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

from rhapsody_mcp.engine.node.launchers import LaunchedProcess, Program
from rhapsody_mcp.engine.process.tree import ENGINE, LIFELINE, PROCESS_MARK, end, marked, send_signal
from rhapsody_mcp.engine.supervisor import STARTED

__all__ = ["StepGroup"]


class StepGroup:
    """The ranks of a job on this node. `on_prepared` gets the path of a shell script for each rank, in order; a script
    becomes the supervisor of its rank."""

    def __init__(self, programs: Sequence[Program], on_prepared: Callable[[list[str]], None]) -> None:
        self._ranks = [_StepProcess(program) for program in programs]
        self.ranks: list[LaunchedProcess] = list(self._ranks)
        on_prepared([rank.script for rank in self._ranks])

    def close(self) -> None:
        """Do nothing: the step ends with its ranks."""

    def end_unstarted(self) -> None:
        """The step has ended: let the ranks that it did not start count as ended."""
        for rank in self._ranks:
            rank.give_up()


class _StepProcess:
    """A supervisor that the scheduler starts. Its end is the end-of-file of a FIFO."""

    def __init__(self, program: Program) -> None:
        self._plan = program.arguments[-1]
        self._mark = program.env[PROCESS_MARK]
        self.script = f"{self._plan}.sh"
        os.mkfifo(self._plan + STARTED, 0o600)
        self._reader = os.open(self._plan + STARTED, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        env = {name: os.environ[name] for name in (ENGINE, LIFELINE)} | program.env
        assignments = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
        with open(self.script, "w", encoding="utf-8") as script:
            script.write("\n".join(["#!/bin/sh", *assignments, f"exec {shlex.join(program.arguments)}", ""]))

    def join(self) -> int:
        poll = select.poll()
        poll.register(self._reader, 0)
        poll.poll()  # the end of a writer is always reported, and that there was none yet is not
        os.close(self._reader)
        return 0 if os.path.exists(f"{self._plan}.outcome") else -signal.SIGKILL

    def terminate(self) -> None:
        send_signal(marked(PROCESS_MARK, self._mark), signal.SIGTERM)

    def kill(self) -> None:
        self.give_up()
        end(lambda: marked(PROCESS_MARK, self._mark))

    def give_up(self) -> None:
        """Let `join` return, and the script start nothing, unless the supervisor has started."""
        with suppress(FileNotFoundError):
            os.unlink(self.script)
        with suppress(OSError):  # `join` has returned
            os.close(os.open(self._plan + STARTED, os.O_WRONLY | os.O_NONBLOCK))
