"""The outcome of a task, and the errors that a task raises when it is awaited."""

from __future__ import annotations

import time

import msgspec

from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value

__all__ = [
    *("Measured", "Outcome", "RankOutcome", "TaskCanceled", "TaskFailed", "Usage", "canceled", "failed"),
    "why_stopped",
]


class RankOutcome(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The outcome of one rank of a job. A negative `exit_code` is the signal that ended the process."""

    rank: int
    host: str = ""
    pid: int = 0
    exit_code: int | None = None
    value: Value | None = None
    stdout: Stream = Stream()
    stderr: Stream = Stream()
    cause: Cause | None = None
    error: str = ""
    traceback: str = ""
    exception: bytes = b""


class Measured(msgspec.Struct, frozen=True, gc=False):
    """What the processes of a task used: CPU seconds of all, and the most memory of one rank with its descendants at a
    time, in bytes. The memory of a function in a shared worker is not known."""

    cpu_s: float
    peak_memory_bytes: int | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a prompt, as the model server counted them."""

    prompt_tokens: int
    completion_tokens: int


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """The final state of a task, with its result or its error. `started` and `ended` are seconds since the epoch.

    `started` is None if user code never ran. `exception` is the pickled exception of a function, or empty; unpickle an
    exception only where user code may run. `notes` are remarks about the run, such as "8 ranks on 2 cores".
    `nodes` are the names of the nodes that the task ran on, the node of rank 0 first; empty on an engine of one node.
    `progress` is what the task has said last of itself. `measured` is None where nothing could be measured. `worker` is
    the number of the worker of the engine that ran a function; None for a process.
    """

    state: TaskState
    ended: float
    started: float | None = None
    value: Value | None = None
    stdout: Stream = Stream()
    stderr: Stream = Stream()
    exit_code: int | None = None
    cause: Cause | None = None
    error: str = ""
    traceback: str = ""
    ranks: tuple[RankOutcome, ...] = ()
    notes: tuple[str, ...] = ()
    usage: Usage | None = None
    exception: bytes = b""
    nodes: tuple[str, ...] = ()
    progress: Progress | None = None
    measured: Measured | None = None
    worker: int | None = None


def failed(cause: Cause, error: str, *, started: float | None = None, exit_code: int | None = None) -> Outcome:
    """The outcome of a task that ends FAILED now."""
    return Outcome(
        state=TaskState.FAILED, started=started, ended=time.time(), cause=cause, error=error, exit_code=exit_code
    )


def canceled(cause: Cause, error: str) -> Outcome:
    """The outcome of a task that ends CANCELED now, without a result."""
    return Outcome(state=TaskState.CANCELED, ended=time.time(), cause=cause, error=error)


class TaskFailed(RhapsodyError):
    """A task ended FAILED. `task` is the task, `uid` its id, `outcome` its outcome; the text has the original message.

    `__cause__` is the exception that the function raised, where this process could get and unpickle the exception.
    """

    code = "task_failed"

    def __init__(self, message: str, outcome: Outcome | None = None, task: object = None, uid: str = "") -> None:
        super().__init__(message, uid=uid)
        self.outcome, self.task = outcome, task

    @property
    def exit_code(self) -> int | None:
        return self.outcome.exit_code if self.outcome else None

    def __reduce__(self) -> tuple[type[TaskFailed], tuple[str, Outcome | None, None, str]]:
        return type(self), (str(self), self.outcome, None, self.uid)


class TaskCanceled(TaskFailed):
    """A task was canceled: by a person, because its session closed, or because a task that it needs failed."""

    code = "task_canceled"


def why_stopped(cause: Cause, timeout_s: float | None = None) -> str:
    """The error text of a task that was ended by a cancellation or by its time limit."""
    return f"its time of {timeout_s} s was up" if cause is Cause.TIMEOUT else "canceled on request"
