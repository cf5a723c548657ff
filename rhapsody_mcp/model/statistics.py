"""Counts and times of a set of tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

import msgspec

from rhapsody_mcp.model.states import TaskState

__all__ = ["Statistics", "Summary", "Timing", "summarise"]


class Timing(msgspec.Struct, frozen=True):
    """One task's state and its times in seconds; the times are None until it has ended."""

    state: TaskState
    queue_s: float | None = None
    execution_s: float | None = None


class Summary(TypedDict):
    """Averages in seconds over the ended tasks, 0.0 where none has: avg_total = avg_queue + avg_execution."""

    total_tasks: int
    avg_total: float
    avg_queue: float
    avg_execution: float


class Statistics(TypedDict):
    """`counts` has only the states that occur."""

    summary: Summary
    counts: dict[str, int]


def summarise(timings: Iterable[Timing]) -> Statistics:
    """Statistics of these tasks. A task's total time is its queue time plus its execution time, always."""
    rows = list(timings)
    queue = _mean(row.queue_s for row in rows)
    execution = _mean(row.execution_s for row in rows)
    return {
        "summary": {
            "total_tasks": len(rows),
            "avg_total": queue + execution,
            "avg_queue": queue,
            "avg_execution": execution,
        },
        "counts": dict(Counter(row.state.value for row in rows)),
    }


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
