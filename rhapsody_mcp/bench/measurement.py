"""Measures a workload and its bare counterpart in turn."""

from __future__ import annotations

import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

__all__ = ["Measurement", "Range", "Row", "Unit", "load_of_machine", "measure", "range_of"]

Work = Callable[[], Awaitable[float]]
Unit = Literal["rate", "time", "share", "bytes"]


@dataclass(frozen=True)
class Row:
    """A row of the benchmark. `ours` and `limit` do the same work `count` times and return seconds. In a row without
    a limit, `shown` says what `ours` returns: seconds, a share of a core, or bytes."""

    name: str
    ours: Work
    limit: Work | None = None
    count: int = 1
    shown: Unit = "time"
    bare: str = ""
    """A description of the limit."""
    warm_up: bool = True


class Range(msgspec.Struct, frozen=True):
    """The range of several runs, in the unit of the row."""

    least: float
    median: float
    most: float


class Measurement(msgspec.Struct, frozen=True):
    """The measured values of a row. `times` is the ratio of ours to the limit: the median over the pairs of runs."""

    name: str
    shown: Unit
    count: int
    runs: int
    ours: Range
    limit: Range | None
    times: float | None
    bare: str


async def measure(row: Row, runs: int) -> Measurement:
    """Measure `runs` pairs, ours and then the limit, after one pair for warm-up."""
    if row.warm_up:
        await _pair(row)
    pairs = [await _pair(row) for _ in range(runs)]
    ours, limits = [own for own, _ in pairs], [limit for _, limit in pairs if limit is not None]
    return Measurement(
        name=row.name,
        shown=row.shown,
        count=row.count,
        runs=runs,
        ours=range_of(ours),
        limit=range_of(limits) if limits else None,
        times=statistics.median(own / limit for own, limit in zip(ours, limits, strict=True)) if limits else None,
        bare=row.bare,
    )


async def _pair(row: Row) -> tuple[float, float | None]:
    return await row.ours(), None if row.limit is None else await row.limit()


def range_of(values: Sequence[float]) -> Range:
    return Range(min(values), statistics.median(values), max(values))


def load_of_machine() -> str:
    """The machine's load, as text: a busy machine spoils measurements."""
    return f"load {os.getloadavg()[0]:.1f} over the last minute, {os.cpu_count()} cores"
