"""Everything that this package raises.

RhapsodyError
├── InvalidRequest          what was asked for cannot be done; asking again changes nothing
│   ├── InvalidTask         a task's fields contradict each other or are out of range
│   ├── InvalidSettings     a settings file or a backend's parameter is wrong
│   └── UnknownName         no backend, session, task, tool argument or model has that name
├── BackendError            a backend could not do its part now; another time it may
│   └── BackendUnavailable  a backend's program is not installed, did not start, or is gone
├── SessionClosed           the session takes no more tasks
├── NotConfirmed            what would be lost or exceeded was not agreed to; nothing was changed
│   └── NeedsForce          nobody could be asked whether they agree
└── TaskFailed              a task ran and failed, or never could
    └── TaskCanceled        a task was canceled before it ended
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rhapsody_mcp.model.outcome import Outcome

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "InvalidRequest",
    "InvalidSettings",
    "InvalidTask",
    "NeedsForce",
    "NotConfirmed",
    "RhapsodyError",
    "SessionClosed",
    "TaskCanceled",
    "TaskFailed",
    "UnknownName",
    "nearest",
    "refuse_unknown",
]


class RhapsodyError(Exception):
    """Any error of this package. Its text says what was wrong, what is valid and what to do next."""


class InvalidRequest(RhapsodyError, ValueError):
    """The request is wrong and would fail again."""


class InvalidTask(InvalidRequest):
    """A task's fields contradict each other or are out of range; nothing of the submission was taken."""


class InvalidSettings(InvalidRequest):
    """A settings file or a backend's parameter is wrong."""


class UnknownName(InvalidRequest):
    """There is nothing of that kind with that name.

    `kind`, `name`, `known` (every valid name) and `valid` (said in their place) are attributes.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], valid: str = "") -> None:
        self.kind, self.name, self.known, self.valid = kind, name, sorted(known), valid
        super().__init__(f"unknown {kind} {name!r}{nearest(name, self.known)}. Valid: {valid or _listed(self.known)}.")

    def __reduce__(self) -> tuple[type[UnknownName], tuple[str, str, list[str], str]]:
        return type(self), (self.kind, self.name, self.known, self.valid)


class BackendError(RhapsodyError):
    """A backend could not do its part now; another time it may."""


class BackendUnavailable(BackendError):
    """A backend's program is not installed, did not start, or is gone."""


class SessionClosed(RhapsodyError):
    """The session is closed and takes no more tasks; open another one."""


class NotConfirmed(RhapsodyError):
    """A person was asked whether to go on and did not agree; nothing was changed."""


class NeedsForce(NotConfirmed):
    """A person must agree to this, and the client cannot ask one; nothing was changed."""


class TaskFailed(RhapsodyError):
    """A task ended FAILED. `task` is the task, `outcome` what came of it; the text holds the original message."""

    def __init__(self, message: str, outcome: Outcome | None = None, task: object = None) -> None:
        super().__init__(message)
        self.outcome, self.task = outcome, task

    def __reduce__(self) -> tuple[type[TaskFailed], tuple[str, Outcome | None]]:
        return type(self), (str(self), self.outcome)


class TaskCanceled(TaskFailed):
    """A task was canceled: by a person, because its session closed, or because a task that it needs failed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` where a known name is close enough to help, else the empty string."""
    by_folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f" (did you mean {by_folded[close[0]]!r}?)" if close else ""


def refuse_unknown(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InvalidTask for the first of `given` that is not `known`, naming the nearest that is."""
    valid = sorted(known)
    for name in given:
        if name not in valid:
            raise InvalidTask(f"unknown {kind} {name!r}{nearest(str(name), valid)}. Valid: {_listed(valid)}.")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:20]) or "none yet"
    return f"{shown}, and {len(names) - 20} more" if len(names) > 20 else shown
