"""The errors that this package raises.

Each error has a stable `code`. `uid` is the id of the task that the error is about, and `field` the name of the task's
field; each is empty where it does not apply.

RhapsodyError
├── InvalidRequest          the request is wrong; the same request fails again
│   ├── InvalidTask         a task's fields contradict each other or are out of range
│   │   └── ResultGone      the file of a result that the task needs no longer exists
│   ├── InvalidSettings     a settings file or a backend's parameter is wrong
│   ├── SchedulerRefusal    the scheduler of the machine does not take the job
│   └── UnknownName         no backend, session, task, tool argument or model has that name
├── BackendError            a backend could not do its part now; a later try may succeed
│   ├── BackendUnavailable  a backend's program is not installed, did not start, or is gone
│   └── SchedulerUnavailable  the scheduler of the machine does not answer
├── LedgerError             the ledger cannot be read or written
│   ├── LedgerInUse         another process holds the ledger
│   ├── LedgerTooNew        a later version of this program wrote the ledger
│   ├── LedgerDamaged       the file of the ledger is damaged, or no ledger
│   └── LedgerUnavailable   the ledger cannot be written now: the disk is full, read-only, ...
├── LimitExceeded           the request would exceed a limit of the server's settings; nothing was taken
├── SessionClosed           the session takes no more tasks
├── NotConfirmed            a person was asked and did not agree; nothing was changed
│   └── NeedsForce          no person could be asked
└── TaskFailed              a task ran and failed, or could not start (in `model/outcome.py`)
    └── TaskCanceled        a task was canceled before it ended
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping
from copy import copy
from itertools import islice
from typing import NoReturn, Self

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "InvalidRequest",
    "InvalidSettings",
    "InvalidTask",
    "LedgerDamaged",
    "LedgerError",
    "LedgerInUse",
    "LedgerTooNew",
    "LedgerUnavailable",
    "LimitExceeded",
    "NeedsForce",
    "NotConfirmed",
    "ResultGone",
    "RhapsodyError",
    "SchedulerRefusal",
    "SchedulerUnavailable",
    "SessionClosed",
    "UnknownName",
    "nearest",
    "refuse_attribute",
    "refuse_import",
    "refuse_other_fields",
    "refuse_unknown",
    "root_of",
]


class RhapsodyError(Exception):
    """The base class of the errors of this package.

    The text says what is wrong, what is valid, and what to do next. Programs should read `code`, which is the same in
    all versions, and not the text. `uid` is the id of the task that the error is about, and `field` the name of the
    field; each is empty where it does not apply.
    """

    code = "failed"
    uid = ""
    field = ""

    def __init__(self, message: str, *, uid: str = "", field: str = "") -> None:
        super().__init__(message)
        self.reason = message
        """The text of the error without the name of the task."""
        if uid:
            self.uid = uid
        if field:
            self.field = field

    def of_task(self, label: str, uid: str = "") -> Self:
        """A copy of the error, with a text that begins with `label`, the name of the task that the error is about."""
        named = copy(self)
        named.args = (f"{label}: {self.reason}",)
        named.uid = uid or self.uid
        return named


class InvalidRequest(RhapsodyError, ValueError):
    """The request is wrong; the same request fails again."""

    code = "invalid_request"


class InvalidTask(InvalidRequest):
    """A task's fields contradict each other or are out of range; nothing of the submission was taken."""

    code = "invalid_task"


class ResultGone(InvalidTask):
    """The file of a result no longer exists, as after a clean-up; only a new run of its task can make it again."""

    code = "result_gone"


class InvalidSettings(InvalidRequest):
    """A settings file or a backend's parameter is wrong."""

    code = "invalid_settings"


class SchedulerRefusal(InvalidRequest):
    """The scheduler of the machine, such as Slurm, does not take the job; the text has the scheduler's own words."""

    code = "scheduler_refused"


_FIELDS = ("backend", "model")
"""The kinds of name that are also fields of a task."""


class UnknownName(InvalidRequest):
    """There is no object of this kind with this name.

    `known` are all valid names; `valid` is a text for the message in place of these names. The code is "unknown_" and
    the kind, as in "unknown_task".
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], valid: str = "") -> None:
        self.kind, self.name, self.known, self.valid = kind, name, sorted(known), valid
        message = f"unknown {kind} {name!r}{nearest(name, self.known)}. Valid: {valid or _listed(self.known)}."
        super().__init__(message, field=kind if kind in _FIELDS else "")
        self.code = f"unknown_{kind.replace(' ', '_')}"

    def __reduce__(self) -> tuple[type[UnknownName], tuple[str, str, list[str], str]]:
        return type(self), (self.kind, self.name, self.known, self.valid)


class BackendError(RhapsodyError):
    """A backend could not do its part now; a later try may succeed."""

    code = "backend_failed"


class BackendUnavailable(BackendError):
    """A backend's program is not installed, did not start, or is gone."""

    code = "backend_unavailable"


class AllocationsUsedUp(BackendError):
    """The session has had as many allocations of the scheduler as it may have."""

    code = "allocations_used_up"


class SchedulerUnavailable(BackendError):
    """The scheduler of the machine does not answer; jobs that run go on.

    What was asked for may still happen, because only the answer may be lost: a job may have been submitted.
    """

    code = "scheduler_unavailable"


class LedgerError(RhapsodyError):
    """The ledger, the database of tasks and sessions, cannot be read or written."""

    code = "ledger_failed"


class LedgerInUse(LedgerError):
    """Another process holds the ledger: process `pid` on `host`, since the time `since`.

    `since` is in seconds since the epoch, 0 where unknown; `pid` is 0 where unknown.
    """

    code = "ledger_in_use"

    def __init__(self, path: str, host: str, pid: int, since: float) -> None:
        self.path, self.host, self.pid, self.since = path, host, pid, since
        holder = f"process {pid} on {host}" if pid else "another process"
        at = f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if since else ""
        super().__init__(
            f"the ledger {path} is held by {holder}{at}. Use that one (`rhapsody-mcp service status` on that host), "
            "end it (`rhapsody-mcp service stop`), or take another folder with --folder."
        )

    def __reduce__(self) -> tuple[type[LedgerInUse], tuple[str, str, int, float]]:
        return type(self), (self.path, self.host, self.pid, self.since)


class LedgerTooNew(LedgerError):
    """A later version of this program wrote the ledger; nothing was changed."""

    code = "ledger_too_new"


class LedgerDamaged(LedgerError):
    """The file of the ledger is damaged, or is no ledger; nothing was changed."""

    code = "ledger_damaged"


class LedgerUnavailable(LedgerError):
    """The ledger could not be written now, and the change was withdrawn; a later try may succeed."""

    code = "ledger_unavailable"


class LimitExceeded(RhapsodyError):
    """The request exceeds a limit of the server's settings; `limit` is the key of the setting. Nothing was taken."""

    code = "limit_exceeded"

    def __init__(self, message: str, limit: str = "", *, uid: str = "", field: str = "") -> None:
        super().__init__(message, uid=uid, field=field)
        self.limit = limit


class SessionClosed(RhapsodyError):
    """The session is closed and takes no more tasks; open another one."""

    code = "session_closed"


class NotConfirmed(RhapsodyError):
    """A person was asked whether to go on and did not agree; nothing was changed."""

    code = "not_confirmed"


class NeedsForce(NotConfirmed):
    """A person must agree to the request, and the client cannot ask a person; nothing was changed."""

    code = "needs_force"


def root_of(error: BaseException) -> BaseException:
    """The first error in an exception group, also in nested groups; an error that is no group itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


_LONGEST_NAME = 128


def nearest(name: str, known: Iterable[str]) -> str:
    """The text `" (did you mean 'x'?)"` with the closest known name; empty where none is close.

    Only the first 1000 names are compared, because a comparison takes time.
    """
    if len(name) > _LONGEST_NAME:
        return ""
    by_folded = {one.casefold(): one for one in islice(known, 1000) if len(one) <= _LONGEST_NAME}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f" (did you mean {by_folded[close[0]]!r}?)" if close else ""


def refuse_unknown(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InvalidTask, with the closest known name, for the first name of `given` that is not in `known`."""
    valid = sorted(known)
    for name in given:
        if name not in valid:
            wrong = f"unknown {kind} {name!r}{nearest(str(name), valid)}. Valid: {_listed(valid)}."
            raise InvalidTask(wrong, field=str(name))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:20]) or "none yet"
    return f"{shown}, and {len(names) - 20} more" if len(names) > 20 else shown


def refuse_other_fields(kind: str, fields: Iterable[str], places: Mapping[str, str]) -> None:
    """Raise InvalidTask for a field that other libraries have; `places` says how this kind of task expresses it."""
    for field in fields:
        if field in places:
            raise InvalidTask(f"{kind} has no field {field!r}; write it as {places[field]}.", field=field)


def refuse_attribute(owner: object, name: str, instead: Mapping[str, str]) -> NoReturn:
    """Raise AttributeError, with a sentence for a name that other libraries have."""
    hint = f": {instead[name]}" if name in instead else ""
    raise AttributeError(f"{type(owner).__name__} has no attribute {name!r}{hint}.", name=name, obj=owner)


def refuse_import(module: str, name: str, instead: Mapping[str, str]) -> NoReturn:
    """Raise ImportError for a name of rhapsody-py that has another one here, else AttributeError."""
    if name not in instead:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    raise ImportError(
        f"{module} has no {name}, as in rhapsody-py: what takes its place is {instead[name]}. "
        "docs/from_rhapsody_py.md lists all that differs.",
        name=module,
    )
