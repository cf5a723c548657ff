"""The outcome of a task, and the errors that awaiting a task raises."""

from __future__ import annotations

import msgspec

from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value

__all__ = ["Outcome", "RankOutcome", "TaskCanceled", "TaskFailed", "Usage", "why_stopped"]


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


class Usage(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a prompt, as the model server counted them."""

    prompt_tokens: int
    completion_tokens: int


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A final state with its result and its errors. `started` and `ended` are seconds since the epoch.

    `started` is None if user code never ran. `exception` is the pickled exception of a function, or empty; unpickle it
    only where user code may run. `notes` are sentences about the run ("8 ranks on 2 cores").
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


class TaskFailed(RhapsodyError):
    """A task ended FAILED. `task` is the task, `uid` its id, `outcome` what came of it; the text holds the original
    message. `__cause__` is what its function raised, where that could be sent and opened here."""

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
    """The error text of a task that was ended because somebody canceled it, or because its time was up."""
    return f"its time of {timeout_s} s was up" if cause is Cause.TIMEOUT else "canceled on request"
