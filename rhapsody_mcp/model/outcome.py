"""The outcome of a task."""

from __future__ import annotations

import msgspec

from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value

__all__ = ["Outcome", "RankOutcome", "Usage"]


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
