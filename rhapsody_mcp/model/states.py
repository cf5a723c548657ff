"""The states of a task and the causes of its failure."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Cause", "TaskState"]


class TaskState(StrEnum):
    """Prints as its bare name. Exactly one of the final states is reached, once."""

    NEW = "NEW"  #: not submitted yet
    WAITING = "WAITING"  #: waits for the results of other tasks
    QUEUED = "QUEUED"  #: can run as soon as there is room
    RUNNING = "RUNNING"  #: user code has started
    DONE = "DONE"  #: ended well
    FAILED = "FAILED"  #: ended badly; `Cause` says how
    CANCELED = "CANCELED"  #: ended before it could end by itself

    @property
    def final(self) -> bool:
        return self in _FINAL


_FINAL = frozenset({TaskState.DONE, TaskState.FAILED, TaskState.CANCELED})


class Cause(StrEnum):
    """Why a task did not end DONE."""

    ERROR = "error"  #: the function raised, or its result could not be sent back
    INVALID = "invalid"  #: could not start as asked: no such executable, module, GPU, ...
    EXIT_CODE = "exit_code"  #: the program ended with an exit code other than 0
    TIMEOUT = "timeout"  #: its time was up
    CRASHED = "crashed"  #: its process died: a signal, no memory, os._exit
    LOST = "lost"  #: the engine that ran it is gone
    UPSTREAM = "upstream"  #: a task whose result it needs did not end DONE
    CANCELED = "canceled"  #: somebody asked for it, or the session closed
