"""The task stream of a session as columns: when each task waited and ran, and in which lane."""

from __future__ import annotations

import math
from array import array
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rhapsody_mcp.model.statistics import name_stem
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, kind_of, name_of

__all__ = ["STATES", "Lane", "Span", "Spans", "group_of"]

STATES = ("DONE", "FAILED", "CANCELED", "skipped")
NO_LANE = 0xFFFF
"""The lane of a task that ended without having run."""
MORE_RANKS = 0x80
"""Added to the state of each span of a job but the first, so that the job counts once."""
_MAX_SLOTS = 512
_KINDS = ("worker", "ended worker", "process", "rank", "prompt")
_MAX_RANKS = 64
"""A job with more ranks has one lane in place of a lane a rank."""
_MAX_GROUPS = 500
_REST = "other tasks"


class Lane(NamedTuple):
    """A worker, or a place in which one process, one rank or one prompt ran at a time. `node` is empty on an engine of
    one node."""

    backend: str
    node: str
    kind: str
    number: int


class Span(NamedTuple):
    """One span of the stream; times are in seconds since the epoch. `end` is the number of the end of its task."""

    lane: int
    group: int
    state: str
    started: float
    ended: float
    end: int


class Spans:
    """Every end of a task of a session, in the order of the ends, as columns; a job has a row for each rank.

    A function has the lane of its worker. Processes, ranks and prompts share the lanes of their backend and node so
    that no two overlap. Times are in seconds since the epoch. Memory is 34 bytes a row.
    """

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.groups: list[str] = []
        self.ended = array("d")
        self.queue_s, self.execution_s, self.cpu_s = array("f"), array("f"), array("f")
        """`cpu_s` is NaN where it was not measured."""
        self.lane, self.group = array("H"), array("H")
        self.state = array("B")
        """The index in STATES, with MORE_RANKS."""
        self.index = array("I")
        """The place of the task in the session's list of ends."""
        self.processes: list[tuple[int, float, int, float]] = []
        """Of each row of a process that has them: its row, cores, GPUs, and peak memory in GB."""
        self.tokens: list[tuple[int, int, int]] = []
        """Of each row of a prompt: its row, and its tokens into and out of the model."""
        self.counts: Counter[str] = Counter()
        self.group_counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.first: float | None = None
        """The first submission."""
        self._lane_numbers: dict[Lane, int] = {}
        self._group_numbers: dict[str, int] = {}
        self._free_from: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        """The last end in each shared lane, by backend, node and kind."""

    def __len__(self) -> int:
        """The rows that are whole, also while another thread adds one."""
        return len(self.index)

    def add(self, task: Task, index: int) -> None:
        """Add a task that has ended; `index` is its place in the session's list of ends."""
        outcome = task.outcome
        assert outcome is not None
        timing, group = task.timing, self.group_number(group_of(task))
        submitted, ended = timing.submitted or outcome.ended, timing.ended or outcome.ended
        self.first = submitted if self.first is None else min(self.first, submitted)
        state = task.counted_as
        if task.replaced_by is None:
            self.counts[state] += 1
            self.group_counts[group][state] += 1
        started, code = None if isinstance(task, ForEach) else timing.started, STATES.index(state)
        cpu_s = outcome.measured.cpu_s if outcome.measured is not None else math.nan
        if started is None:
            self._append(ended, ended - submitted, 0.0, cpu_s, NO_LANE, group, code, index)
            return
        for rank, lane in enumerate(self._lanes_of(task, outcome.worker, started, ended)):
            self._append(ended, started - submitted, ended - started, cpu_s, lane, group, code, index)
            code |= MORE_RANKS if rank == 0 else 0
        self._add_amounts(task, len(self) - 1)

    def _append(
        self,
        ended: float,
        queue_s: float,
        execution_s: float,
        cpu_s: float,
        lane: int,
        group: int,
        state: int,
        index: int,
    ) -> None:
        self.ended.append(ended)
        self.queue_s.append(queue_s)
        self.execution_s.append(execution_s)
        self.cpu_s.append(cpu_s)
        self.lane.append(lane)
        self.group.append(group)
        self.state.append(state)
        self.index.append(index)  # the last one: see `__len__`

    def _add_amounts(self, task: Task, row: int) -> None:
        outcome = task.outcome
        assert outcome is not None
        if (usage := outcome.usage) is not None:
            self.tokens.append((row, usage.prompt_tokens, usage.completion_tokens))
        if isinstance(task, ComputeTask) and task.layout.groups:
            peak = (outcome.measured.peak_memory_bytes or 0) if outcome.measured is not None else 0
            self.processes.append((row, task.layout.cores, task.layout.gpus, round(peak / 1e9, 3)))

    def group_number(self, name: str) -> int:
        number = self._group_numbers.get(name)
        if number is None:
            if len(self.groups) >= _MAX_GROUPS and name != _REST:
                return self.group_number(_REST)
            number = self._group_numbers[name] = len(self.groups)
            self.groups.append(name)
        return number

    def group_name(self, task: Task) -> str:
        """The group of a task, as it is numbered here."""
        return self.groups[self.group_number(group_of(task))]

    def _lane_number(self, lane: Lane) -> int:
        number = self._lane_numbers.get(lane)
        if number is None:
            number = self._lane_numbers[lane] = min(len(self.lanes), NO_LANE - 1)
            self.lanes.append(lane)
        return number

    def _lanes_of(self, task: Task, worker: int | None, started: float, ended: float) -> list[int]:
        backend = task.backend or ""
        if worker is not None:
            return [self._lane_number(Lane(backend, next(iter(task.nodes), ""), "worker", worker))]
        return [
            self._lane_number(Lane(*place, _take_slot(self._free_from[place], started, ended)))
            for place in _places(task)
        ]

    def running_lanes(self, tasks: Sequence[Task], now: float) -> list[int]:
        """The lane of each of these running tasks until now, of a job that of its first rank."""
        taken = {place: list(ends) for place, ends in self._free_from.items()}
        lanes = []
        for task in tasks:
            backend, started = task.backend or "", task.started or now
            if task.started_in is not None:
                lanes.append(self._lane_number(Lane(backend, next(iter(task.nodes), ""), "worker", task.started_in)))
                continue
            slots = [
                Lane(*place, _take_slot(taken.setdefault(place, []), started, math.inf)) for place in _places(task)
            ]
            lanes.append(min(map(self._lane_number, slots)))
        return lanes

    # --- reading

    def block(self, first: int, last: int) -> dict[str, Any]:
        """The rows from `first` until before `last`, as the page reads them: each column is the base64 text of numbers
        of its type, little-endian."""
        columns: dict[str, array[float] | array[int]] = {
            "ended": self.ended[first:last],
            "queue": self.queue_s[first:last],
            "execution": self.execution_s[first:last],
            "cpu": self.cpu_s[first:last],
            "lane": self.lane[first:last],
            "group": self.group[first:last],
            "state": self.state[first:last],
        }
        return {
            "first": first,
            "rows": last - first,
            **{name: b64encode(column.tobytes()).decode() for name, column in columns.items()},
            "processes": [row for row in _from(self.processes, first) if row[0] < last],
            "tokens": [row for row in _from(self.tokens, first) if row[0] < last],
        }

    def since(self, rows: int = 0, lanes: int = 0, groups: int = 0) -> dict[str, Any]:
        """What a page lacks that has so many rows, lanes and groups: the fields of `block`, with the names."""
        return {
            "reset": lanes == 0 and groups == 0,
            "lanes": self.lanes[lanes:],
            "order": self.order(),
            "groups": self.groups[groups:],
            **self.block(rows, len(self)),
        }

    def counts_task(self, row: int) -> bool:
        """Whether the row is that of a task that ran; false for the further ranks of a job."""
        return self.lane[row] != NO_LANE and not self.state[row] & MORE_RANKS

    def __iter__(self) -> Iterator[Span]:
        """The spans of the tasks that ran."""
        for row in range(len(self)):
            lane = self.lane[row]
            if lane != NO_LANE:
                ended = self.ended[row]
                state = STATES[self.state[row] & ~MORE_RANKS]
                yield Span(lane, self.group[row], state, ended - self.execution_s[row], ended, self.index[row])

    def order(self) -> list[int]:
        """The numbers of the lanes, as people read them: by backend and node, workers first, then by number."""
        return sorted(range(len(self.lanes)), key=lambda number: _sort_key(self.lanes[number]))


def _sort_key(lane: Lane) -> tuple[str, str, int, int]:
    return lane.backend, lane.node, _KINDS.index(lane.kind), lane.number


def _from(rows: Sequence[tuple[Any, ...]], first: int) -> Sequence[tuple[Any, ...]]:
    """The rows from row number `first` on; most often these are the last ones."""
    at = len(rows)
    while at and rows[at - 1][0] >= first:
        at -= 1
    return rows[at:]


def _places(task: Task) -> Iterable[tuple[str, str, str]]:
    """Backend, node and kind of each rank, process or prompt of the task."""
    backend, nodes = task.backend or "", task.nodes
    if not isinstance(task, ComputeTask):
        return [(backend, "", "prompt")]
    ranks = task.layout.ranks if task.layout.mode == "job" else 1
    kind = "ended worker" if task.layout.mode == "native" else "process" if ranks == 1 else "rank"
    if not 1 < ranks <= _MAX_RANKS:
        return [(backend, next(iter(nodes), ""), kind)]
    share = -(-ranks // max(1, len(nodes)))
    return [(backend, nodes[rank // share] if nodes else "", kind) for rank in range(ranks)]


def _take_slot(ends: list[float], started: float, ended: float) -> int:
    """The number of the slot that was free for the shortest time before `started`, which is taken until `ended`."""
    best = max((slot for slot, end in enumerate(ends) if end <= started), key=ends.__getitem__, default=None)
    if best is None:
        if len(ends) >= _MAX_SLOTS:
            return _MAX_SLOTS - 1
        best = len(ends)
        ends.append(ended)
    ends[best] = ended
    return best


def group_of(task: Task) -> str:
    """What the page colours the task by: the name of its ForEach, its own name without a number at its end, or its
    kind."""
    if task.parent is not None:
        return name_of(task.parent)
    if isinstance(task, ForEach) or task.name:
        return name_stem(task.name or "") or name_of(task)
    return f"{kind_of(task)} tasks"
