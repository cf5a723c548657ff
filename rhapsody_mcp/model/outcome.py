"""What came of a task."""

from __future__ import annotations

import msgspec

from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value

__all__ = ["Outcome", "RankOutcome", "Usage", "why_stopped"]


class RankOutcome(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One rank of a job. A negative `exit_code` is the signal that ended it."""

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
    """Tokens of a prompt's request, as the server counted them."""

    prompt_tokens: int
    completion_tokens: int


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A final state with everything that belongs to it. `started` and `ended` are seconds since the epoch.

    `started` is None where user code never ran. `exception` is what a function raised, pickled, where that is sent:
    to be opened where user code may run. `notes` are sentences about how it ran ("8 ranks on 2 cores").
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


def why_stopped(cause: Cause, timeout_s: float | None = None) -> str:
    """The error text of a task that was ended because somebody canceled it, or because its time was up."""
    return f"its time of {timeout_s} s was up" if cause is Cause.TIMEOUT else "canceled on request"
