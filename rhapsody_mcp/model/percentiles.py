"""Mean and percentiles of numbers that arrive in batches, without a sort of all numbers."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TypedDict

__all__ = ["Distribution", "Spread", "spread_of"]


class Spread(TypedDict):
    """The spread of a distribution; all 0.0 without numbers.

    Percentiles are by nearest rank: p95 is the least of the numbers that at least 95 % of them do not exceed.
    """

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Distribution:
    """Numbers in sorted runs, each at least twice as long as the next; takes 8 bytes a number."""

    def __init__(self) -> None:
        self.runs: list[array[float]] = []
        self.sum = 0.0

    def add(self, numbers: Sequence[float]) -> None:
        run = sorted(numbers)
        self.sum += math.fsum(run)
        while self.runs and len(self.runs[-1]) < 2 * len(run):
            run = sorted([*self.runs.pop(), *run])  # sorted() merges two sorted runs
        if run:
            self.runs.append(array("d", run))


def spread_of(distributions: Sequence[Distribution]) -> Spread:
    """The spread of the numbers of all distributions together."""
    runs = [run for distribution in distributions for run in distribution.runs]
    count = sum(map(len, runs))
    if not count:
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0, "max": 0.0}

    def percentile(percent: int) -> float:
        return _ranked(runs, math.ceil(percent * count / 100) - 1)

    return {
        "mean": math.fsum(distribution.sum for distribution in distributions) / count,
        "p50": percentile(50),
        "p95": percentile(95),
        "p99": percentile(99),
        "max": max(run[-1] for run in runs),
    }


def _ranked(runs: Sequence[array[float]], rank: int) -> float:
    """The number at this rank (from 0) of all runs together. Each step halves the remaining part of the longest run."""
    bounds = [(0, len(run)) for run in runs]
    while True:
        low, high, run = max(((low, high, run) for (low, high), run in zip(bounds, runs, strict=True)), key=_length)
        pivot = run[(low + high) // 2]
        lefts = [bisect_left(run, pivot, *bound) for run, bound in zip(runs, bounds, strict=True)]
        rights = [bisect_right(run, pivot, *bound) for run, bound in zip(runs, bounds, strict=True)]
        below = sum(left - low for left, (low, _) in zip(lefts, bounds, strict=True))
        equal = sum(right - left for left, right in zip(lefts, rights, strict=True))
        if rank < below:
            bounds = [(low, left) for left, (low, _) in zip(lefts, bounds, strict=True)]
        elif rank < below + equal:
            return pivot
        else:
            rank -= below + equal
            bounds = [(right, high) for right, (_, high) in zip(rights, bounds, strict=True)]


def _length(bounded: tuple[int, int, array[float]]) -> int:
    return bounded[1] - bounded[0]
