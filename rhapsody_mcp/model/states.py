"""The states of a task, and the causes of a failure."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Cause", "TaskState"]


class TaskState(StrEnum):
    """The state of a task; a state prints as its name. Each task reaches exactly one final state, once."""

    NEW = "NEW"  #: not submitted yet
    WAITING = "WAITING"  #: waits for other tasks
    QUEUED = "QUEUED"  #: can run as soon as there is room
    RUNNING = "RUNNING"  #: user code has started
    DONE = "DONE"  #: ended well
    FAILED = "FAILED"  #: ended with an error; `Cause` says why
    CANCELED = "CANCELED"  #: ended on request

    @property
    def final(self) -> bool:
        return self in _FINAL


_FINAL = frozenset({TaskState.DONE, TaskState.FAILED, TaskState.CANCELED})


class Cause(StrEnum):
    """Why a task did not end DONE."""

    ERROR = "error"  #: the function raised, or its result could not be sent back
    INVALID = "invalid"  #: could not start: no such executable, module, GPU, ...
    EXIT_CODE = "exit_code"  #: the program ended with an exit code other than 0
    TIMEOUT = "timeout"  #: reached its time limit
    CRASHED = "crashed"  #: its process died: a signal, no memory, os._exit
    MEMORY = "memory"  #: used more memory than it had asked for
    LOST = "lost"  #: its engine ended
    UPSTREAM = "upstream"  #: a task that it depends on did not end DONE
    CANCELED = "canceled"  #: a request, or the session was closed
    SKIPPED = "skipped"  #: a condition did not hold: its own, or that of a task that it needs; no failure
