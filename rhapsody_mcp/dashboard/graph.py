"""The graph of a session: its tasks, or groups of them, and which need which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rhapsody_mcp.dashboard.spans import group_of
from rhapsody_mcp.model.critical_path import CriticalPath
from rhapsody_mcp.model.statistics import name_stem
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, name_of

__all__ = ["TaskGraph"]

_MAX_TASKS = 40
"""A session with more tasks is shown by groups."""
_MAX_NODES, _MAX_EDGES = 150, 400


class TaskGraph:
    """Grows with the submissions of a session. A ForEach is one node. `group` gives the name of a task's group."""

    def __init__(self, group: Callable[[Task], str] = group_of) -> None:
        self._group = group
        self._tasks: list[Task] = []
        """The first ones, for as long as each is a node."""
        self._sizes: Counter[str] = Counter()
        """The number of tasks in each group, without those of a ForEach, which can be made later."""
        self._sweeps: list[ForEach] = []
        self._edges: Counter[tuple[str, str]] = Counter()

    def add(self, tasks: Iterable[Task]) -> None:
        """Add submitted tasks, a ForEach without its children."""
        for task in tasks:
            group = self._group(task)
            if isinstance(task, ForEach):
                self._sweeps.append(task)
            elif task.replaced_by is None:
                self._sizes[group] += 1
            if len(self._tasks) <= _MAX_TASKS:
                self._tasks.append(task)
            for source in task.sources():
                self._edges[self._group(source), group] += 1

    def describe(self, counts: Mapping[str, Mapping[str, int]], path: CriticalPath | None) -> dict[str, Any]:
        """Nodes and edges; `counts` are the tasks that have ended in each state, by group. Nodes that the critical path
        goes through are marked."""
        on_path = {step["task"] for step in path["steps"]} if path is not None else set()
        if len(self._tasks) <= _MAX_TASKS:
            return self._of_tasks(on_path)
        sizes = self._sizes.copy()
        for sweep in self._sweeps:
            sizes[self._group(sweep)] += len(leaves([sweep])) if sweep.replaced_by is None else 0
        on_path |= {name_stem(name) or name for name in on_path}
        nodes = [
            {"id": group, "name": group, "counts": dict(counts.get(group, {})), "total": size, "path": group in on_path}
            for group, size in sizes.most_common(_MAX_NODES)
        ]
        shown = {node["id"] for node in nodes}
        between = [
            (edge, count) for edge, count in self._edges.most_common() if edge[0] != edge[1] and {*edge} <= shown
        ]
        edges = [[*edge, count] for edge, count in between[:_MAX_EDGES]]
        left_out = {"left_out": max(0, len(sizes) - len(nodes)), "edges_left_out": len(between) - len(edges)}
        return {"of": "groups", "nodes": nodes, "edges": edges, **left_out}

    def _of_tasks(self, on_path: set[str]) -> dict[str, Any]:
        nodes = [
            {
                "id": task.uid,
                "name": name_of(task),
                "counts": dict(Counter(leaf.counted_as for leaf in leaves([task]))),
                "total": len(leaves([task])),
                "path": any(name_of(leaf) in on_path for leaf in leaves([task])),
                "replaced": task.replaced_by is not None,
            }
            for task in self._tasks
        ]
        edges = [
            [(source.parent or source).uid, task.uid, 1]
            for task in self._tasks
            for source in dict.fromkeys(task.sources())
        ]
        shown = edges[:_MAX_EDGES]
        return {
            **{"of": "tasks", "nodes": nodes, "edges": shown},
            **{"left_out": 0, "edges_left_out": len(edges) - len(shown)},
        }
