"""Statistics of a set of tasks and of its groups: counts, times and rates."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypedDict

from rhapsody_mcp.model.critical_path import CriticalPath, Sources, find_critical_path
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.model.percentiles import Spread, spread_of
from rhapsody_mcp.model.task_totals import BusyTime, Row, TokenTotals, Totals, merge_intervals
from rhapsody_mcp.model.timing import Timing

__all__ = [
    "Busy",
    "Measures",
    "Places",
    "Spread",
    "Statistics",
    "Summary",
    "Tally",
    "Times",
    "Tokens",
    "name_stem",
]

_NUMBERED = re.compile(r"(.*?)[-_. \[]*\d+\]?")


class Summary(TypedDict):
    """Averages in seconds over the tasks that ran and have ended; 0.0 without such tasks.

    avg_total = avg_queue + avg_execution.
    """

    total_tasks: int
    avg_total: float
    avg_queue: float
    avg_execution: float


class Times(TypedDict):
    """Times in seconds. Each task's total is the sum of its queue and its execution. The means add up in this way,
    the percentiles do not."""

    queue: Spread
    execution: Spread
    total: Spread


class Tokens(TypedDict):
    """Tokens of prompts into and out of the model; the rates count the time in which at least one prompt ran."""

    prompt_tokens: int
    completion_tokens: int
    in_per_s: float | None
    out_per_s: float | None


class Used(TypedDict):
    """What tasks used: CPU seconds of all functions and processes, and the most memory of one rank of a task in a
    process of its own, with the name of this task."""

    cpu_s: float
    peak_memory_bytes: int
    largest: str


class Measures(TypedDict):
    """`counts` has only the states that occur.

    `ran` is the number of tasks that started and have ended, the failed ones too. `times` are the times of these tasks,
    `throughput` is their number a second from the first start to the last end. A rate is None where no time has passed,
    `tokens` is None where no server counted tokens, and `used` where nothing was measured.
    """

    counts: dict[str, int]
    ran: int
    times: Times
    throughput: float | None
    tokens: Tokens | None
    used: Used | None


class Places(NamedTuple):
    """How many functions a backend runs at a time, and the cores that functions and processes share."""

    workers: int
    cores: int


class Busy(TypedDict):
    """The average `share` of a backend's `places` that tasks used, from the first start to the last end, without the
    time in which no submitted task was left.

    A native function uses a worker, and each process the cores that its task asked for, at least a part of one.
    `seconds` are the sum over the places.
    """

    backend: str
    of: Literal["workers", "cores"]
    places: int
    share: float
    seconds: float


class Statistics(Measures):
    """`makespan` is the time in seconds from the first submission to the last end of the tasks that ran; `idle` is the
    part of it in which no submitted task was left.

    `groups` are by name, the one with the most execution time first. `nodes` are the numbers of tasks that ran on each
    node, a job on each of its nodes; empty where all ran on one node.
    """

    summary: Summary
    makespan: float
    idle: float
    busy: list[Busy]
    critical_path: CriticalPath
    groups: dict[str, Measures]
    nodes: dict[str, int]


class Tally:
    """Adds tasks up as they end, so that statistics of many tasks take no longer than of few.

    The groups are: the tasks of one ForEach, by its name; tasks whose names differ only in a number at the end, by the
    common stem ("sim" of sim-1 and sim-2); and the other tasks by kind, as in "function tasks".
    """

    def __init__(self, stems: Iterable[str] = ()) -> None:
        self._totals: dict[str, Totals] = {}
        """By group."""
        self._stems = set(stems)
        """The stems with at least two tasks."""
        self._single: dict[str, Row] = {}
        """By stem, each task that is so far the only one with this stem."""

    def add(self, rows: Iterable[Row]) -> None:
        """Add tasks that have ended, each once."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            stem = _stem(row)
            if row.for_each or not stem:
                groups.setdefault(row.for_each or _kind_group(row), []).append(row)
            elif stem in self._stems:
                groups.setdefault(stem, []).append(row)
            elif (first := self._single.pop(stem, None)) is not None:
                self._stems.add(stem)
                groups.setdefault(stem, []).extend((first, row))
            else:
                self._single[stem] = row
        for name, members in groups.items():
            self._totals.setdefault(name, Totals()).add(members)

    def statistics(
        self,
        others: Iterable[Row],
        find: Callable[[str], Row | None],
        sources: Sources,
        backends: Mapping[str, Places],
        group: str | None = None,
    ) -> Statistics:
        """Statistics of all added tasks and of `others`, such as those that have not ended; or of one group.

        `find` returns the row of a uid, None for a task that does not count; `backends` has the places by
        backend. Raises UnknownName for an unknown group.
        """
        rest = Tally(self._stems)
        rest.add([*self._single.values(), *others])
        groups = self._groups(rest)
        if group is not None:
            if group not in groups:
                raise UnknownName("group", group, groups)
            groups = {group: groups[group]}

        def timing(uid: str) -> Timing | None:
            row = find(uid)
            counts = row is not None and (group is None or self._group_of(row, rest) == group)
            return row.timing if row is not None and counts else None

        def name_of(uid: str) -> str:
            row = find(uid)
            return row.name or uid if row is not None else uid

        parts = [totals for group_parts in groups.values() for totals in group_parts]
        last = max((totals.last for totals in parts if totals.last is not None), default=None)
        measures = _measures(parts)
        gaps = _gaps(parts)
        return {
            "summary": _summary(sum(measures["counts"].values()), measures["times"]),
            **measures,
            "makespan": _span((totals.submitted for totals in parts), (totals.ended for totals in parts)),
            "idle": sum(end - start for start, end in gaps),
            "busy": _busy(parts, backends, gaps),
            "critical_path": find_critical_path(last[2] if last else None, timing, name_of, sources),
            "groups": _slowest_first(groups) if len(groups) > 1 else dict.fromkeys(groups, measures),
            "nodes": dict(sum((totals.nodes for totals in parts), Counter()).most_common()),
        }

    def _groups(self, rest: Tally) -> dict[str, list[Totals]]:
        """The totals of each group, in up to three parts: added tasks, other tasks, and tasks with single names."""
        single: dict[str, list[Row]] = {}
        for row in rest._single.values():
            single.setdefault(_kind_group(row), []).append(row)
        groups: dict[str, list[Totals]] = {}
        for parts in (self._totals, rest._totals, {name: Totals.of(rows) for name, rows in single.items()}):
            for name, totals in parts.items():
                groups.setdefault(name, []).append(totals)
        return groups

    def _group_of(self, row: Row, rest: Tally) -> str:
        stem = _stem(row)
        return row.for_each or (stem if stem and stem not in rest._single else _kind_group(row))


def _stem(row: Row) -> str:
    """As `name_stem`; empty for a task of a ForEach."""
    return "" if row.for_each or not row.name else name_stem(row.name)


def name_stem(name: str) -> str:
    """The name without the number at its end; empty for a name without a number."""
    match = _NUMBERED.fullmatch(name)
    return match[1] if match else ""


def _kind_group(row: Row) -> str:
    return f"{row.kind} tasks"


def _summary(tasks: int, times: Times) -> Summary:
    return {
        "total_tasks": tasks,
        "avg_total": times["total"]["mean"],
        "avg_queue": times["queue"]["mean"],
        "avg_execution": times["execution"]["mean"],
    }


def _slowest_first(groups: Mapping[str, Sequence[Totals]]) -> dict[str, Measures]:
    measures = {name: _measures(parts) for name, parts in groups.items()}

    def execution_s(name: str) -> float:
        return measures[name]["times"]["execution"]["mean"] * measures[name]["ran"]

    return {name: measures[name] for name in sorted(measures, key=execution_s, reverse=True)}


def _measures(parts: Sequence[Totals]) -> Measures:
    counts: Counter[str] = Counter()
    for totals in parts:
        counts.update(totals.counts)
    ran = sum(totals.ran for totals in parts)
    seconds = _span((totals.started for totals in parts), (totals.ended for totals in parts))
    return {
        "counts": dict(counts),
        "ran": ran,
        "times": _times(parts),
        "throughput": _rate(ran, seconds),
        "tokens": _tokens([totals.prompts for totals in parts]),
        "used": _used(parts),
    }


def _used(parts: Sequence[Totals]) -> Used | None:
    cpu_s = sum(totals.cpu_s for totals in parts)
    largest = max(parts, key=lambda totals: totals.peak_memory_bytes, default=None)
    if largest is None or not (cpu_s or largest.peak_memory_bytes):
        return None
    return {"cpu_s": cpu_s, "peak_memory_bytes": largest.peak_memory_bytes, "largest": largest.largest}


def _times(parts: Sequence[Totals]) -> Times:
    times: Times = {
        "queue": spread_of([totals.queue for totals in parts]),
        "execution": spread_of([totals.execution for totals in parts]),
        "total": spread_of([totals.total for totals in parts]),
    }
    times["total"]["mean"] = times["queue"]["mean"] + times["execution"]["mean"]
    return times


def _span(starts: Iterable[float], ends: Iterable[float]) -> float:
    """Seconds from the first start to the last end; 0.0 without any."""
    return max(0.0, max(ends, default=0.0) - min(starts, default=0.0))


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _tokens(parts: Sequence[TokenTotals]) -> Tokens | None:
    if not any(totals.counted for totals in parts):
        return None
    prompt_tokens = sum(totals.prompt_tokens for totals in parts)
    completion_tokens = sum(totals.completion_tokens for totals in parts)
    running = merge_intervals(interval for totals in parts for interval in totals.running.intervals)
    seconds = sum(end - start for start, end in running)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "in_per_s": _rate(prompt_tokens, seconds),
        "out_per_s": _rate(completion_tokens, seconds),
    }


def _gaps(parts: Sequence[Totals]) -> list[tuple[float, float]]:
    """The intervals, before the last end, in which no submitted task was left."""
    present = merge_intervals(interval for totals in parts for interval in totals.present.intervals)
    last_end = max((totals.ended for totals in parts), default=-math.inf)
    gaps = ((end, start) for (_, end), (start, _) in pairwise(present))
    return [(start, min(end, last_end)) for start, end in gaps if start < last_end]


def _busy(parts: Sequence[Totals], backends: Mapping[str, Places], gaps: Sequence[tuple[float, float]]) -> list[Busy]:
    used: dict[tuple[str, Literal["workers", "cores"]], list[tuple[float, BusyTime]]] = {}
    for totals in parts:
        for (backend, cores), busy_time in totals.busy.items():
            if backend in backends:
                used.setdefault((backend, "cores" if cores else "workers"), []).append((cores or 1, busy_time))
    rows: list[Busy] = []
    for (backend, of), uses in used.items():
        places = backends[backend].workers if of == "workers" else backends[backend].cores
        busy_s = sum(busy.seconds * min(each, places) for each, busy in uses)
        if (seconds := _present_s([busy for _, busy in uses], gaps)) > 0:
            share = busy_s / (places * seconds)
            rows.append({"backend": backend, "of": of, "places": places, "share": share, "seconds": busy_s})
    return rows


def _present_s(uses: Sequence[BusyTime], gaps: Sequence[tuple[float, float]]) -> float:
    """The seconds from the first start to the last end, without the gaps."""
    first, last = min(busy.started for busy in uses), max(busy.ended for busy in uses)
    return last - first - sum(max(0.0, min(end, last) - max(start, first)) for start, end in gaps)
