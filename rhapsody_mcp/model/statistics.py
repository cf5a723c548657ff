"""Counts, times and rates of a set of tasks, and of the groups that they fall into."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict

import msgspec

from rhapsody_mcp.model.critical_path import CriticalPath, Sources, find_critical_path
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.model.outcome import Usage
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.timing import Timing

__all__ = ["Busy", "Measures", "Row", "Spread", "Statistics", "Summary", "Times", "Tokens", "summarise"]

_NUMBERED = re.compile(r"(.*?)[-_. \[]*\d+\]?")


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A task as statistics see it.

    `for_each` names the ForEach that made it; `ranks` counts the processes of its own, 0 for what runs in a worker.
    """

    uid: str
    kind: str
    state: TaskState
    timing: Timing
    name: str | None = None
    for_each: str | None = None
    backend: str = ""
    ranks: int = 0
    usage: Usage | None = None


class Summary(TypedDict):
    """Averages in seconds over the tasks that ran and have ended, 0.0 where none has.

    avg_total = avg_queue + avg_execution.
    """

    total_tasks: int
    avg_total: float
    avg_queue: float
    avg_execution: float


class Spread(TypedDict):
    """Of numbers; all 0.0 where there are none.

    Percentiles are by nearest rank: p95 is the least of the numbers that at least 95 % of them do not exceed.
    """

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Times(TypedDict):
    """In seconds. Each task's total is its queue plus its execution; so is the mean's, but no percentile's."""

    queue: Spread
    execution: Spread
    total: Spread


class Tokens(TypedDict):
    """Of prompts: into the model and out of it, and how many a second of the time in which at least one ran."""

    prompt_tokens: int
    completion_tokens: int
    in_per_s: float | None
    out_per_s: float | None


class Measures(TypedDict):
    """`counts` has only the states that occur.

    `ran` is the number of tasks that started and have ended, the failed ones too: `times` are theirs, and
    `throughput` is how many of them there were a second, from the first start to the last end. A rate is None where
    no time has passed, `tokens` where no server counted any.
    """

    counts: dict[str, int]
    ran: int
    times: Times
    throughput: float | None
    tokens: Tokens | None


class Busy(TypedDict):
    """The `share` of a backend's `places` that tasks took, on average from their first start to their last end.

    A native function takes a worker, a process a slot, and a job a slot for each rank.
    """

    backend: str
    of: Literal["workers", "process slots"]
    places: int
    share: float


class Statistics(Measures):
    """`makespan` is in seconds, from the first submission to the last end of the tasks that ran.

    `groups` are by name, that of the most execution time first.
    """

    summary: Summary
    makespan: float
    busy: list[Busy]
    critical_path: CriticalPath
    groups: dict[str, Measures]


class _Run(msgspec.Struct, frozen=True, gc=False):
    """A task that started and has ended."""

    row: Row
    submitted: float
    started: float
    ended: float


def summarise(
    rows: Iterable[Row], sources: Sources, workers: Mapping[str, int], group: str | None = None
) -> Statistics:
    """Statistics of these tasks, or of one group of them; `workers` is the number of workers by backend.

    A group is what one ForEach made, by its name; tasks whose names differ in a number at the end alone, by what
    comes before it (sim-1 and sim-2 are "sim"); and the rest by kind, as in "function tasks".
    Raises UnknownName where there is no such group.
    """
    chosen = list(rows)
    groups = _grouped(chosen)
    if group is not None:
        if group not in groups:
            raise UnknownName("group", group, groups)
        chosen = groups[group]
        groups = {group: chosen}
    runs = _runs(chosen)
    measures = _measure(chosen, runs)
    return {
        "summary": _summary(len(chosen), measures["times"]),
        **measures,
        "makespan": max(run.ended for run in runs) - min(run.submitted for run in runs) if runs else 0.0,
        "busy": _busy(runs, workers),
        "critical_path": _critical_path(chosen, sources),
        "groups": _slowest_first(groups) if len(groups) > 1 else dict.fromkeys(groups, measures),
    }


def _runs(rows: Iterable[Row]) -> list[_Run]:
    return [
        _Run(row, timing.submitted, timing.started, timing.ended)
        for row in rows
        if (timing := row.timing).submitted is not None and timing.started is not None and timing.ended is not None
    ]


def _summary(tasks: int, times: Times) -> Summary:
    return {
        "total_tasks": tasks,
        "avg_total": times["total"]["mean"],
        "avg_queue": times["queue"]["mean"],
        "avg_execution": times["execution"]["mean"],
    }


def _critical_path(rows: Sequence[Row], sources: Sources) -> CriticalPath:
    names = {row.uid: row.name or row.uid for row in rows}
    return find_critical_path({row.uid: row.timing for row in rows}, names.__getitem__, sources)


# --- groups


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    stems = [_stem(row) for row in rows]
    members = Counter(stems)
    groups: dict[str, list[Row]] = {}
    for row, stem in zip(rows, stems, strict=True):
        name = row.for_each or (stem if stem and members[stem] > 1 else f"{row.kind} tasks")
        groups.setdefault(name, []).append(row)
    return groups


def _stem(row: Row) -> str:
    """What comes before the number at the end of its name; empty where there is none."""
    found = None if row.for_each or not row.name else _NUMBERED.fullmatch(row.name)
    return found[1] if found else ""


def _slowest_first(groups: Mapping[str, Sequence[Row]]) -> dict[str, Measures]:
    measured = {name: _measure(rows, _runs(rows)) for name, rows in groups.items()}

    def seconds(name: str) -> float:
        return measured[name]["times"]["execution"]["mean"] * measured[name]["ran"]

    return {name: measured[name] for name in sorted(measured, key=seconds, reverse=True)}


# --- numbers


def _measure(rows: Sequence[Row], runs: Sequence[_Run]) -> Measures:
    return {
        "counts": {state.value: count for state, count in Counter(row.state for row in rows).items()},
        "ran": len(runs),
        "times": _times(runs),
        "throughput": _rate(len(runs), _span(runs)),
        "tokens": _tokens(runs),
    }


def _times(runs: Sequence[_Run]) -> Times:
    queue = [run.started - run.submitted for run in runs]
    execution = [run.ended - run.started for run in runs]
    times: Times = {
        "queue": _spread(queue),
        "execution": _spread(execution),
        "total": _spread([waited + ran for waited, ran in zip(queue, execution, strict=True)]),
    }
    times["total"]["mean"] = times["queue"]["mean"] + times["execution"]["mean"]
    return times


def _spread(numbers: list[float]) -> Spread:
    ordered = sorted(numbers) or [0.0]

    def percentile(percent: int) -> float:
        return ordered[math.ceil(percent * len(ordered) / 100) - 1]

    return {
        "mean": sum(ordered) / len(ordered),
        "p50": percentile(50),
        "p95": percentile(95),
        "p99": percentile(99),
        "max": ordered[-1],
    }


def _span(runs: Sequence[_Run]) -> float:
    """Seconds from the first start to the last end."""
    return max(run.ended for run in runs) - min(run.started for run in runs) if runs else 0.0


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _tokens(runs: Sequence[_Run]) -> Tokens | None:
    prompts = [run for run in runs if run.row.kind == "prompt"]
    usages = [run.row.usage for run in prompts if run.row.usage is not None]
    if not usages:
        return None
    into, out = sum(usage.prompt_tokens for usage in usages), sum(usage.completion_tokens for usage in usages)
    seconds = _covered(prompts)
    return {
        "prompt_tokens": into,
        "completion_tokens": out,
        "in_per_s": _rate(into, seconds),
        "out_per_s": _rate(out, seconds),
    }


def _covered(runs: Iterable[_Run]) -> float:
    """Seconds in which at least one of them ran."""
    covered, until = 0.0, -math.inf
    for start, end in sorted((run.started, run.ended) for run in runs):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def _busy(runs: Iterable[_Run], workers: Mapping[str, int]) -> list[Busy]:
    places: dict[tuple[str, Literal["workers", "process slots"]], list[_Run]] = {}
    for run in runs:
        if run.row.backend in workers and run.row.kind in ("function", "executable"):
            places.setdefault((run.row.backend, "process slots" if run.row.ranks else "workers"), []).append(run)
    return [
        {"backend": backend, "of": of, "places": workers[backend], "share": _share(taking, workers[backend])}
        for (backend, of), taking in places.items()
        if _span(taking) > 0
    ]


def _share(runs: Sequence[_Run], places: int) -> float:
    taken = sum((run.ended - run.started) * min(max(run.row.ranks, 1), places) for run in runs)
    return taken / (places * _span(runs))
