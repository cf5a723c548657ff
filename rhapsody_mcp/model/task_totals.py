"""Totals of a set of tasks, of which statistics are made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from rhapsody_mcp.model.outcome import Measured, Usage
from rhapsody_mcp.model.percentiles import Distribution
from rhapsody_mcp.model.timing import Timing

__all__ = ["BusyTime", "Row", "TokenTotals", "Totals", "merge_intervals"]


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The facts of a task that statistics use.

    `for_each` names the ForEach that made the task; `cores` are those of its processes, 0 for a task in a worker.
    `state` is "skipped" for a skipped task.
    """

    uid: str
    kind: str
    state: str
    timing: Timing
    name: str | None = None
    for_each: str | None = None
    backend: str = ""
    cores: float = 0
    usage: Usage | None = None
    measured: Measured | None = None
    nodes: tuple[str, ...] = ()


class Totals:
    """Totals of tasks. Memory grows by 24 bytes a task, for the percentiles."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.ran = 0
        self.queue, self.execution, self.total = Distribution(), Distribution(), Distribution()
        self.submitted = self.started = math.inf
        self.ended = -math.inf
        self.last: tuple[float, int, str] | None = None
        """The task that ended last, of several the first one: its end, minus its number, its uid."""
        self.busy: dict[tuple[str, float], BusyTime] = {}
        """By backend and cores."""
        self.nodes: Counter[str] = Counter()
        """The tasks that ran on each node, where the nodes are known."""
        self.cpu_s, self.peak_memory_bytes, self.largest = 0.0, 0, ""
        """The CPU seconds of all tasks, the most memory of one rank in bytes, and the task that used it."""
        self.prompts = TokenTotals()
        self.present = Intervals()
        """The times in which at least one task was submitted and had not ended."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Self:
        totals = cls()
        totals.add(rows)
        return totals

    def add(self, rows: Sequence[Row]) -> None:
        self.counts.update(row.state for row in rows)
        self.present.add(
            (timing.submitted, math.inf if timing.ended is None else timing.ended)
            for row in rows
            if (timing := row.timing).submitted is not None
        )
        runs = [
            (row, timing.submitted, timing.started, timing.ended)
            for row in rows
            if (timing := row.timing).submitted is not None and timing.started is not None and timing.ended is not None
        ]
        if runs:
            self._add_runs(runs)

    def _add_runs(self, runs: Sequence[tuple[Row, float, float, float]]) -> None:
        """Rows with the times of submission, start and end."""
        queue = [started - submitted for _, submitted, started, _ in runs]
        execution = [ended - started for _, _, started, ended in runs]
        self.queue.add(queue)
        self.execution.add(execution)
        self.total.add([queue_s + execution_s for queue_s, execution_s in zip(queue, execution, strict=True)])
        self.submitted = min(self.submitted, min(submitted for _, submitted, _, _ in runs))
        self.started = min(self.started, min(started for _, _, started, _ in runs))
        self.ended = max(self.ended, max(ended for _, _, _, ended in runs))
        for number, (row, _, started, ended) in enumerate(runs, self.ran):
            if self.last is None or ended > self.last[0]:
                self.last = ended, -number, row.uid
            if row.kind in ("function", "executable"):
                key = row.backend, row.cores
                if key not in self.busy:
                    self.busy[key] = BusyTime()
                self.busy[key].add(started, ended)
            if row.measured is not None:
                self._add_measured(row, row.measured)
        self.ran += len(runs)
        self.nodes.update(node for row, _, _, _ in runs for node in row.nodes)
        self.prompts.add([(row, started, ended) for row, _, started, ended in runs if row.kind == "prompt"])

    def _add_measured(self, row: Row, measured: Measured) -> None:
        self.cpu_s += measured.cpu_s
        if (measured.peak_memory_bytes or 0) > self.peak_memory_bytes:
            self.peak_memory_bytes, self.largest = measured.peak_memory_bytes or 0, row.name or row.uid


class BusyTime:
    """The sum of the tasks' execution times, with the first start and the last end."""

    def __init__(self) -> None:
        self.seconds, self.started, self.ended = 0.0, math.inf, -math.inf

    def add(self, started: float, ended: float) -> None:
        self.seconds += ended - started
        if started < self.started:
            self.started = started
        if ended > self.ended:
            self.ended = ended


class Intervals:
    """Intervals of time, in order and without overlaps."""

    def __init__(self) -> None:
        self.intervals: list[tuple[float, float]] = []

    def add(self, intervals: Iterable[tuple[float, float]]) -> None:
        if new := list(intervals):
            first = min(start for start, _ in new)
            while self.intervals and self.intervals[-1][1] >= first:
                new.append(self.intervals.pop())
            self.intervals += merge_intervals(new)


class TokenTotals:
    """Tokens of prompts, and the times in which at least one prompt ran."""

    def __init__(self) -> None:
        self.counted = self.prompt_tokens = self.completion_tokens = 0
        """`counted` is the number of prompts whose tokens a server counted."""
        self.running = Intervals()

    def add(self, runs: Sequence[tuple[Row, float, float]]) -> None:
        usages = [row.usage for row, _, _ in runs if row.usage is not None]
        self.counted += len(usages)
        self.prompt_tokens += sum(usage.prompt_tokens for usage in usages)
        self.completion_tokens += sum(usage.completion_tokens for usage in usages)
        self.running.add((started, ended) for _, started, ended in runs)


def merge_intervals(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The intervals in order, with overlapping ones merged."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged
