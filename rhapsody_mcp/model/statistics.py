"""Counts, times and rates of a set of tasks, and of the groups that they fall into."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, Self, TypedDict

import msgspec

from rhapsody_mcp.model.critical_path import CriticalPath, Sources, find_critical_path
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.model.outcome import Usage
from rhapsody_mcp.model.percentiles import Numbers, Spread, spread
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.timing import Timing

__all__ = ["Busy", "Measures", "Row", "Spread", "Statistics", "Summary", "Tally", "Times", "Tokens"]

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
    """The `share` of a backend's `places` that tasks took, on average from their first start to their last end, without
    the time in which nothing was submitted that had not ended.

    A native function takes a worker, a process a slot, and a job a slot for each rank.
    """

    backend: str
    of: Literal["workers", "process slots"]
    places: int
    share: float


class Statistics(Measures):
    """`makespan` is in seconds, from the first submission to the last end of the tasks that ran; `idle` are those of it
    between an end and the next submission, with nothing to do.

    `groups` are by name, that of the most execution time first.
    """

    summary: Summary
    makespan: float
    idle: float
    busy: list[Busy]
    critical_path: CriticalPath
    groups: dict[str, Measures]


class Tally:
    """Adds tasks up as they end, so that statistics of many take no longer than of few.

    A group is what one ForEach made, by its name; tasks whose names differ in a number at the end alone, by what
    comes before it (sim-1 and sim-2 are "sim"); and the rest by kind, as in "function tasks".
    """

    def __init__(self, stems: Iterable[str] = ()) -> None:
        self._sums: dict[str, _Sum] = {}
        self._stems = set(stems)
        self._alone: dict[str, Row] = {}
        """By its stem, each task whose name differs from no other's in a number alone."""

    def add(self, rows: Iterable[Row]) -> None:
        """Tasks that have ended, each once."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            stem = _stem(row)
            if row.for_each or not stem:
                groups.setdefault(row.for_each or _kind_group(row), []).append(row)
            elif stem in self._stems:
                groups.setdefault(stem, []).append(row)
            elif (first := self._alone.pop(stem, None)) is not None:
                self._stems.add(stem)
                groups.setdefault(stem, []).extend((first, row))
            else:
                self._alone[stem] = row
        for name, members in groups.items():
            self._sums.setdefault(name, _Sum()).add(members)

    def statistics(
        self,
        others: Iterable[Row],
        find: Callable[[str], Row | None],
        sources: Sources,
        workers: Mapping[str, int],
        group: str | None = None,
    ) -> Statistics:
        """Statistics of all that was added and of `others`, such as those that have not ended; or of one group.

        `find` gives any of them by its uid, and None for another task's; `workers` is the number of workers by backend.
        Raises UnknownName where there is no such group.
        """
        rest = Tally(self._stems)
        rest.add([*self._alone.values(), *others])
        single: dict[str, list[Row]] = {}
        for row in rest._alone.values():
            single.setdefault(_kind_group(row), []).append(row)
        groups: dict[str, list[_Sum]] = {}
        for sums in (self._sums, rest._sums, {name: _Sum.of(rows) for name, rows in single.items()}):
            for name, one in sums.items():
                groups.setdefault(name, []).append(one)
        if group is not None:
            if group not in groups:
                raise UnknownName("group", group, groups)
            groups = {group: groups[group]}

        def timing(uid: str) -> Timing | None:
            row = find(uid)
            counts = row is not None and (group is None or self._group_of(row, rest) == group)
            return row.timing if row is not None and counts else None

        def called(uid: str) -> str:
            row = find(uid)
            return row.name or uid if row is not None else uid

        chosen = [one for sums in groups.values() for one in sums]
        last = max((one.last for one in chosen if one.last is not None), default=None)
        measures = _measure(chosen)
        gaps = _gaps(chosen)
        return {
            "summary": _summary(sum(measures["counts"].values()), measures["times"]),
            **measures,
            "makespan": _between((one.submitted for one in chosen), (one.ended for one in chosen)),
            "idle": sum(end - start for start, end in gaps),
            "busy": _busy(chosen, workers, gaps),
            "critical_path": find_critical_path(last[2] if last else None, timing, called, sources),
            "groups": _slowest_first(groups) if len(groups) > 1 else dict.fromkeys(groups, measures),
        }

    def _group_of(self, row: Row, rest: Tally) -> str:
        stem = _stem(row)
        return row.for_each or (stem if stem and stem not in rest._alone else _kind_group(row))


def _stem(row: Row) -> str:
    """What comes before the number at the end of its name; empty where there is none."""
    found = None if row.for_each or not row.name else _NUMBERED.fullmatch(row.name)
    return found[1] if found else ""


def _kind_group(row: Row) -> str:
    return f"{row.kind} tasks"


def _summary(tasks: int, times: Times) -> Summary:
    return {
        "total_tasks": tasks,
        "avg_total": times["total"]["mean"],
        "avg_queue": times["queue"]["mean"],
        "avg_execution": times["execution"]["mean"],
    }


def _slowest_first(groups: Mapping[str, Sequence[_Sum]]) -> dict[str, Measures]:
    measured = {name: _measure(sums) for name, sums in groups.items()}

    def seconds(name: str) -> float:
        return measured[name]["times"]["execution"]["mean"] * measured[name]["ran"]

    return {name: measured[name] for name in sorted(measured, key=seconds, reverse=True)}


# --- sums


class _Sum:
    """What statistics need of tasks, whose number it does not grow with but for 24 bytes each."""

    def __init__(self) -> None:
        self.counts: Counter[TaskState] = Counter()
        self.ran = 0
        self.queue, self.execution, self.total = Numbers(), Numbers(), Numbers()
        self.submitted = self.started = math.inf
        self.ended = -math.inf
        self.last: tuple[float, int, str] | None = None
        """Of the task that ended last, and of several the first: its end, minus its number, and its uid."""
        self.places: dict[tuple[str, int], _Taken] = {}
        """By backend and ranks."""
        self.prompts = _Prompts()
        self.present = _Stretches()
        """In which at least one task was submitted and had not ended."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Self:
        made = cls()
        made.add(rows)
        return made

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
        if not runs:
            return
        queue = [started - submitted for _, submitted, started, _ in runs]
        execution = [ended - started for _, _, started, ended in runs]
        self.queue.add(queue)
        self.execution.add(execution)
        self.total.add([waited + ran for waited, ran in zip(queue, execution, strict=True)])
        self.submitted = min(self.submitted, min(submitted for _, submitted, _, _ in runs))
        self.started = min(self.started, min(started for _, _, started, _ in runs))
        self.ended = max(self.ended, max(ended for _, _, _, ended in runs))
        for number, (row, _, started, ended) in enumerate(runs, self.ran):
            if self.last is None or ended > self.last[0]:
                self.last = ended, -number, row.uid
            if row.kind in ("function", "executable"):
                place = row.backend, row.ranks
                if place not in self.places:
                    self.places[place] = _Taken()
                self.places[place].add(started, ended)
        self.ran += len(runs)
        self.prompts.add([(row, started, ended) for row, _, started, ended in runs if row.kind == "prompt"])


class _Taken:
    """How long places were taken, and from when to when."""

    def __init__(self) -> None:
        self.seconds, self.started, self.ended = 0.0, math.inf, -math.inf

    def add(self, started: float, ended: float) -> None:
        self.seconds += ended - started
        if started < self.started:
            self.started = started
        if ended > self.ended:
            self.ended = ended


class _Stretches:
    """Stretches of time, in order, with those that overlap in one."""

    def __init__(self) -> None:
        self.joined: list[tuple[float, float]] = []

    def add(self, stretches: Iterable[tuple[float, float]]) -> None:
        if new := list(stretches):
            first = min(start for start, _ in new)
            while self.joined and self.joined[-1][1] >= first:
                new.append(self.joined.pop())
            self.joined += _joined(new)


class _Prompts:
    """Tokens, and the stretches of time in which at least one prompt ran."""

    def __init__(self) -> None:
        self.counted = self.into = self.out = 0
        self.stretches = _Stretches()

    def add(self, runs: Sequence[tuple[Row, float, float]]) -> None:
        usages = [row.usage for row, _, _ in runs if row.usage is not None]
        self.counted += len(usages)
        self.into += sum(usage.prompt_tokens for usage in usages)
        self.out += sum(usage.completion_tokens for usage in usages)
        self.stretches.add((started, ended) for _, started, ended in runs)


def _joined(stretches: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """In order, with those that overlap in one."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(stretches):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


# --- numbers


def _measure(sums: Sequence[_Sum]) -> Measures:
    counts: Counter[TaskState] = Counter()
    for one in sums:
        counts.update(one.counts)
    ran = sum(one.ran for one in sums)
    seconds = _between((one.started for one in sums), (one.ended for one in sums))
    return {
        "counts": {state.value: count for state, count in counts.items()},
        "ran": ran,
        "times": _times(sums),
        "throughput": _rate(ran, seconds),
        "tokens": _tokens([one.prompts for one in sums]),
    }


def _times(sums: Sequence[_Sum]) -> Times:
    times: Times = {
        "queue": spread([one.queue for one in sums]),
        "execution": spread([one.execution for one in sums]),
        "total": spread([one.total for one in sums]),
    }
    times["total"]["mean"] = times["queue"]["mean"] + times["execution"]["mean"]
    return times


def _between(firsts: Iterable[float], lasts: Iterable[float]) -> float:
    """Seconds from the first to the last; 0.0 where there is none."""
    return max(0.0, max(lasts, default=0.0) - min(firsts, default=0.0))


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _tokens(prompts: Sequence[_Prompts]) -> Tokens | None:
    if not any(one.counted for one in prompts):
        return None
    into, out = sum(one.into for one in prompts), sum(one.out for one in prompts)
    seconds = sum(end - start for start, end in _joined(one for some in prompts for one in some.stretches.joined))
    return {
        "prompt_tokens": into,
        "completion_tokens": out,
        "in_per_s": _rate(into, seconds),
        "out_per_s": _rate(out, seconds),
    }


def _gaps(sums: Sequence[_Sum]) -> list[tuple[float, float]]:
    """Between tasks that ran, where none was there."""
    joined = _joined(stretch for one in sums for stretch in one.present.joined)
    last = max((one.ended for one in sums), default=-math.inf)
    gaps = ((end, start) for (_, end), (start, _) in pairwise(joined))
    return [(start, min(end, last)) for start, end in gaps if start < last]


def _busy(sums: Sequence[_Sum], workers: Mapping[str, int], gaps: Sequence[tuple[float, float]]) -> list[Busy]:
    places: dict[tuple[str, Literal["workers", "process slots"]], list[tuple[int, _Taken]]] = {}
    for one in sums:
        for (backend, ranks), taken in one.places.items():
            if backend in workers:
                places.setdefault((backend, "process slots" if ranks else "workers"), []).append((ranks, taken))
    shares = ((backend, of, _share(taking, workers[backend], gaps)) for (backend, of), taking in places.items())
    return [
        {"backend": backend, "of": of, "places": workers[backend], "share": share}
        for backend, of, share in shares
        if share is not None
    ]


def _share(taking: Sequence[tuple[int, _Taken]], places: int, gaps: Sequence[tuple[float, float]]) -> float | None:
    """None where no time has passed."""
    first, last = min(taken.started for _, taken in taking), max(taken.ended for _, taken in taking)
    seconds = last - first - sum(max(0.0, min(end, last) - max(start, first)) for start, end in gaps)
    taken_s = sum(taken.seconds * min(max(ranks, 1), places) for ranks, taken in taking)
    return taken_s / (places * seconds) if seconds > 0 else None
