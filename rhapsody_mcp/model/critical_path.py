"""Which chain of tasks, each waiting for the one before, a run took its time for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

from rhapsody_mcp.model.timing import Timing

__all__ = ["CriticalPath", "Sources", "Step", "Timings", "find_critical_path"]

Sources = Callable[[str], Iterable[str]]
"""The uids of the tasks that the one of this uid waited for."""
Timings = Callable[[str], Timing | None]
"""When the task of this uid ran; None where it does not count."""


class Step(TypedDict):
    """A task of the path, in seconds.

    `queue` counts from the end of the step before, or from its own submission where that came later; then
    `unsubmitted` is the time in between, in which nobody had asked for it yet.
    """

    task: str
    unsubmitted: float
    queue: float
    execution: float


class CriticalPath(TypedDict):
    """`seconds` is from the first step's submission to the last one's end: the sum of all that its steps took."""

    seconds: float
    steps: list[Step]


class _Ended(NamedTuple):
    uid: str
    submitted: float
    started: float | None
    ended: float


def find_critical_path(
    last: str | None, timing: Timings, names: Callable[[str], str], sources: Sources
) -> CriticalPath:
    """From the task that ended last, always back to the source that ended last; empty where none ran."""
    chain = _chain(last, timing, sources)
    steps: list[Step] = []
    now = chain[0].submitted if chain else 0.0
    for one in chain:
        ready = max(now, one.submitted)
        started = max(ready, one.ended if one.started is None else one.started)
        end = max(started, one.ended)
        steps.append(
            {"task": names(one.uid), "unsubmitted": ready - now, "queue": started - ready, "execution": end - started}
        )
        now = end
    return {"seconds": now - chain[0].submitted if chain else 0.0, "steps": steps}


def _chain(last: str | None, timing: Timings, sources: Sources) -> list[_Ended]:
    """First to last."""
    found = _last_ended(timing, () if last is None else (last,))
    chain: list[_Ended] = []
    while found is not None:
        chain.append(found)
        found = _last_ended(timing, sources(found.uid))
    return chain[::-1]


def _last_ended(timing: Timings, uids: Iterable[str]) -> _Ended | None:
    last: _Ended | None = None
    for uid in uids:
        found = timing(uid)
        if found is None or found.submitted is None or found.ended is None:
            continue
        if last is None or found.ended > last.ended:
            last = _Ended(uid, found.submitted, found.started, found.ended)
    return last
