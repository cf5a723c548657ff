"""The critical path of a run: the chain of dependent tasks that determined its duration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

from rhapsody_mcp.model.timing import Timing

__all__ = ["CriticalPath", "Sources", "Step", "Timings", "find_critical_path"]

Sources = Callable[[str], Iterable[str]]
"""Gives the uids of the tasks for which the task of this uid waited."""
Timings = Callable[[str], Timing | None]
"""Gives the timing of the task of this uid; None for a task that does not count."""


class Step(TypedDict):
    """A task of the path, with times in seconds.

    `queue` counts from the end of the step before, or from the task's submission if that came later; `unsubmitted` is
    the time between the two.
    """

    task: str
    unsubmitted: float
    queue: float
    execution: float


class CriticalPath(TypedDict):
    """`seconds` is the time from the first submission to the last end: the sum of all times of the steps."""

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
    """The path that ends with the task `last`, which ended last; before each step comes the latest of its sources."""
    chain = _chain(last, timing, sources)
    steps: list[Step] = []
    now = chain[0].submitted if chain else 0.0
    for task in chain:
        ready = max(now, task.submitted)
        started = max(ready, task.ended if task.started is None else task.started)
        end = max(started, task.ended)
        steps.append(
            {"task": names(task.uid), "unsubmitted": ready - now, "queue": started - ready, "execution": end - started}
        )
        now = end
    return {"seconds": now - chain[0].submitted if chain else 0.0, "steps": steps}


def _chain(last: str | None, timing: Timings, sources: Sources) -> list[_Ended]:
    """First to last."""
    task = _last_ended(timing, () if last is None else (last,))
    chain: list[_Ended] = []
    while task is not None:
        chain.append(task)
        task = _last_ended(timing, sources(task.uid))
    return chain[::-1]


def _last_ended(timing: Timings, uids: Iterable[str]) -> _Ended | None:
    last: _Ended | None = None
    for uid in uids:
        times = timing(uid)
        if times is None or times.submitted is None or times.ended is None:
            continue
        if last is None or times.ended > last.ended:
            last = _Ended(uid, times.submitted, times.started, times.ended)
    return last
