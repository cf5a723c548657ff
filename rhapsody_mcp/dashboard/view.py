"""What the page shows of one session: collected as its tasks end, and described as plain JSON data."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rhapsody_mcp.dashboard.failures import Failures
from rhapsody_mcp.dashboard.graph import TaskGraph
from rhapsody_mcp.dashboard.spans import Spans, group_of
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.statistics import Statistics
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, is_hidden, name_of

__all__ = ["SessionView"]

_TASKS_PER_STEP = 500
_RUNNING_SHOWN = 300
_NOTICES_SHOWN = 20
_TIMES_SHOWN = 200
_GROUPS_SHOWN = 50
_STATISTICS_SHARE = 50
"""Statistics are computed again after so many times the time that they took, and once all tasks have ended."""
_FACTS: tuple[str, ...] = ("host", "cores", "gpus", "memory_gb", "model", "device")
"""What is shown of a backend's description of itself."""
_COUNTED = ("WAITING", "QUEUED", "RUNNING", "DONE", "FAILED", "CANCELED", "skipped")


class SessionView:
    """Collects what has happened since the last look, so that a look at many tasks takes no longer than at few.

    `epoch` grows when the rows of `spans` no longer hold, because ended tasks ran again or were replaced.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.epoch = 0
        self._catching_up = asyncio.Lock()
        self._statistics: Statistics | None = None
        self._statistics_due, self._statistics_ends = 0.0, 0
        self._begin()

    def _begin(self) -> None:
        self.spans, self.failures = Spans(), Failures()
        self.graph = TaskGraph(self.spans.group_name)
        self._rewrites = self.session.rewrites
        self._seen_ends = self._seen_tasks = 0

    async def catch_up(self) -> None:
        """Collect what has happened, in steps between which other work goes on."""
        async with self._catching_up:
            for _ in self._steps():
                await asyncio.sleep(0)

    def catch_up_now(self) -> None:
        """As `catch_up`, in one step."""
        for _ in self._steps():
            pass

    def _steps(self) -> Iterator[None]:
        session = self.session
        if self._rewrites != session.rewrites:
            self.epoch += 1
            self._begin()
            self._statistics_due = 0.0
        while self._seen_tasks < session.task_count:
            tasks = session.tasks_from(self._seen_tasks, _TASKS_PER_STEP)
            self._seen_tasks += len(tasks)
            self.graph.add(tasks)
            yield
        while (first := self._seen_ends) < len(session.ended):
            ended = session.ended[first : first + _TASKS_PER_STEP]
            self._seen_ends += len(ended)
            for index, task in enumerate(ended, first):
                # a task that runs again is added at its last end; the children stand for a ForEach
                if task.position == index and not (isinstance(task, ForEach) and task.children):
                    self.spans.add(task, index)
                    if task.replaced_by is None:
                        self.failures.add(task)
            yield

    # --- descriptions

    def head(self) -> dict[str, Any]:
        """Everything but the spans, as it is now."""
        now, session, spans = time.time(), self.session, self.spans
        open_counts, running, waiting_since = self._open_tasks()
        statistics = self._current_statistics()
        submitted = [task.submitted for task in running if task.submitted]
        known = [*submitted, *(at for at in waiting_since if at), *([spans.first] if spans.first is not None else [])]
        counts = open_counts | spans.counts
        shown = sorted(running, key=lambda task: task.started or now)[:_RUNNING_SHOWN]
        return {
            "session": self.name,
            "now": now,
            "first": min(known, default=None),
            "closed": session.closed,
            "counts": {state: counts[state] for state in _COUNTED if counts.get(state)},
            "running": self._running_rows(shown, now),
            "waiting_since": _merged(waiting_since),
            "failures": self.failures.describe(),
            "failures_left_out": self.failures.left_out,
            "graph": self.graph.describe(self.group_counts(), statistics and statistics["critical_path"]),
            "statistics": statistics and _measures(statistics),
            "backends": self._backend_rows(),
            "notices": [{"at": notice.at, "text": notice.text} for notice in list(session.notices)[-_NOTICES_SHOWN:]],
        }

    def running(self) -> list[Task]:
        """The tasks that run, the ones that started first first."""
        running = self._open_tasks()[1]
        return sorted(running, key=lambda task: task.started or 0.0)[:_RUNNING_SHOWN]

    def group_of(self, task: Task) -> int:
        """The number of the group that a task is coloured by."""
        return self.spans.group_number(group_of(task))

    def open_tasks(self) -> Iterator[Task]:
        """The tasks that have not ended; the children stand for a ForEach."""
        for task in self.session.unfinished.values():
            if not is_hidden(task) and not (isinstance(task, ForEach) and task.children):
                yield task

    def _open_tasks(self) -> tuple[dict[str, int], list[Task], dict[float, int]]:
        """The counts of the tasks that have not ended, those of them that run, and how many others were submitted
        when."""
        running: list[Task] = []
        submitted: dict[float, int] = {}
        queued = waiting = 0
        for task in self.open_tasks():
            state = task.state
            if state is TaskState.RUNNING:
                running.append(task)
                continue
            if state is TaskState.QUEUED:
                queued += 1
            else:
                waiting += 1
            at = task.submitted or 0.0
            submitted[at] = submitted.get(at, 0) + 1
        return {"WAITING": waiting, "QUEUED": queued, "RUNNING": len(running)}, running, submitted

    def _running_rows(self, tasks: list[Task], now: float) -> list[dict[str, Any]]:
        return [
            {
                "uid": task.uid,
                "name": name_of(task),
                "group": self.group_of(task),
                "lane": lane,
                "started": task.started,
                "needs": _needs(task),
                **_progress(task),
            }
            for task, lane in zip(tasks, self.spans.running_lanes(tasks, now), strict=True)
        ]

    def group_counts(self) -> dict[str, Counter[str]]:
        """How many tasks of each group have ended in each state."""
        return {self.spans.groups[number]: counts.copy() for number, counts in self.spans.group_counts.items()}

    def _backend_rows(self) -> list[dict[str, Any]]:
        engines = self.session.engines
        return [
            {
                "name": backend.name,
                "runs": sorted(backend.kinds),
                "workers": backend.num_workers,
                "engine": engines.get(backend.name, ""),
                **{key: value for key, value in backend.describe().items() if key in _FACTS},
            }
            for backend in self.session.backends
        ]

    def _current_statistics(self) -> Statistics | None:
        now = time.monotonic()
        ended = len(self.session.ended)
        is_last = not self.session.unfinished and ended != self._statistics_ends
        if now >= self._statistics_due or is_last:
            self._statistics, self._statistics_ends = self.session.get_statistics(), ended
            self._statistics_due = time.monotonic() + _STATISTICS_SHARE * (time.monotonic() - now)
        return self._statistics if self._statistics and self._statistics["ran"] else None


def _needs(task: Task) -> dict[str, float] | None:
    """The cores and GPUs of a task in processes of its own; None for a task in a worker, and a prompt."""
    if not isinstance(task, ComputeTask) or not task.layout.groups:
        return None
    return {"cores": task.layout.cores, "gpus": task.layout.gpus}


def _merged(counts: dict[float, int]) -> list[tuple[float, int]]:
    """Counts by time, in order; of many times, the later ones of a few are put into one."""
    rows = sorted(counts.items())
    size = -(-len(rows) // _TIMES_SHOWN)
    return [(rows[at][0], sum(count for _, count in rows[at : at + size])) for at in range(0, len(rows), size or 1)]


def _progress(task: Task) -> dict[str, Any]:
    progress = task.progress
    if progress is None:
        return {}
    said = {"step": progress.step, "of": progress.of, "message": progress.message, "numbers": progress.numbers}
    return {"progress": {key: value for key, value in said.items() if value not in (None, "", {})}}


def _measures(statistics: Statistics) -> dict[str, Any]:
    path = statistics["critical_path"]
    return {
        "makespan": statistics["makespan"],
        "times": statistics["times"],
        "throughput": statistics["throughput"],
        "tokens": statistics["tokens"],
        "used": statistics["used"],
        "busy": statistics["busy"],
        "nodes": statistics["nodes"],
        "path": {"seconds": path["seconds"], "steps": path["steps"][-200:]},
        "groups": {
            name: {key: group[key] for key in ("counts", "ran", "times", "throughput")}
            for name, group in list(statistics["groups"].items())[:_GROUPS_SHOWN]
        },
        "groups_left_out": max(0, len(statistics["groups"]) - _GROUPS_SHOWN),
    }
