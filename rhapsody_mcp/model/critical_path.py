"""Which chain of tasks, each waiting for the one before, a run took its time for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypedDict

from rhapsody_mcp.model.timing import Timing

__all__ = ["CriticalPath", "Sources", "Step", "find_critical_path"]

Sources = Callable[[str], Iterable[str]]
"""The uids of the tasks that the one of this uid waited for."""


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


def find_critical_path(timings: Mapping[str, Timing], names: Callable[[str], str], sources: Sources) -> CriticalPath:
    """From the task that ended last, always back to the source that ended last; empty where none ran."""
    chain = _chain(timings, sources)
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


def _chain(timings: Mapping[str, Timing], sources: Sources) -> list[_Ended]:
    """First to last."""
    found = _last_ended(timings, (uid for uid, timing in timings.items() if timing.started is not None))
    chain: list[_Ended] = []
    while found is not None:
        chain.append(found)
        found = _last_ended(timings, sources(found.uid))
    return chain[::-1]


def _last_ended(timings: Mapping[str, Timing], uids: Iterable[str]) -> _Ended | None:
    last: _Ended | None = None
    for uid in uids:
        timing = timings.get(uid)
        if timing is None or timing.submitted is None or timing.ended is None:
            continue
        if last is None or timing.ended > last.ended:
            last = _Ended(uid, timing.submitted, timing.started, timing.ended)
    return last
