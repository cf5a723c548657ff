"""Runs a piece of work and its bare counterpart in turn, and keeps what each took."""

from __future__ import annotations

import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

__all__ = ["Figure", "Row", "Shown", "Spread", "load_of_machine", "measure", "spread_of"]

Work = Callable[[], Awaitable[float]]
Shown = Literal["rate", "time", "share", "bytes"]


@dataclass(frozen=True)
class Row:
    """`ours` and `limit` do the same work, `count` times, and give the seconds that it took; a row without a limit
    gives what `shown` says: a share of a core, or bytes."""

    name: str
    ours: Work
    limit: Work | None = None
    count: int = 1
    shown: Shown = "time"
    bare: str = ""
    """What the limit is, in words."""
    warm_up: bool = True


class Spread(msgspec.Struct, frozen=True):
    """Of several runs: seconds, or what the row shows."""

    least: float
    median: float
    most: float


class Figure(msgspec.Struct, frozen=True):
    """One row's outcome. `times` is how many times as long ours took as the limit: the median over the pairs."""

    name: str
    shown: Shown
    count: int
    runs: int
    ours: Spread
    limit: Spread | None
    times: float | None
    bare: str


async def measure(row: Row, runs: int) -> Figure:
    """In turn, ours then the limit, after one run of each that does not count."""
    if row.warm_up:
        await _pair(row)
    pairs = [await _pair(row) for _ in range(runs)]
    ours, limits = [one for one, _ in pairs], [other for _, other in pairs if other is not None]
    return Figure(
        name=row.name,
        shown=row.shown,
        count=row.count,
        runs=runs,
        ours=spread_of(ours),
        limit=spread_of(limits) if limits else None,
        times=statistics.median(one / other for one, other in zip(ours, limits, strict=True)) if limits else None,
        bare=row.bare,
    )


async def _pair(row: Row) -> tuple[float, float | None]:
    return await row.ours(), None if row.limit is None else await row.limit()


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(min(values), statistics.median(values), max(values))


def load_of_machine() -> str:
    """How busy it is, in words: a busy one spoils what is measured on it."""
    return f"load {os.getloadavg()[0]:.1f} over the last minute, {os.cpu_count()} cores"
