"""Counts the tasks that come before a queued one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.tasks import ForEach, Task, is_hidden

__all__ = ["queued_before"]


def queued_before(tasks: Iterable[Task], queued: Iterable[Task], unfinished: Iterable[Task]) -> dict[str, int]:
    """By uid, how many tasks of its backend come before each of the tasks. `queued` is in the order of waiting."""
    positions = {task.uid: 0 for task in tasks}
    found: dict[str, Task] = {}
    counts: Counter[tuple[str | None, int]] = Counter()
    for task in queued:
        key = task.backend, task.priority
        if task.uid in positions:
            positions[task.uid], found[task.uid] = counts[key], task
        if not is_hidden(task):
            counts[key] += 1
    running = Counter(
        task.backend for task in unfinished if task.state is TaskState.RUNNING and not isinstance(task, ForEach)
    )
    for uid, task in found.items():
        higher = sum(count for (name, level), count in counts.items() if name == task.backend and level > task.priority)
        positions[uid] += higher + running[task.backend]
    return {uid: positions[uid] for uid in found}
