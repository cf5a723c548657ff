"""The graph of tasks that wait for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["depends_on", "refuse_cycles"]


def depends_on(task: Task, source: Task) -> bool:
    """Whether `task` waits for `source`, also through other tasks, or is the same task."""
    pending, seen = [task], set[str]()
    while pending:
        current = pending.pop()
        if current is source:
            return True
        if current.uid not in seen and not current.state.final:
            seen.add(current.uid)
            pending += current.sources()
    return False


def refuse_cycles(tasks: Sequence[Task]) -> None:
    """Raise InvalidTask where tasks of one submission wait for each other in a cycle; of a child, its ForEach."""
    batch = {task.uid: task for task in tasks}
    missing = {
        uid: inside
        for uid, task in batch.items()
        if (needed := task.sources())
        and (inside := {top for source in needed if (top := (source.parent or source).uid) in batch})
    }
    dependents: dict[str, list[str]] = {}
    for uid, sources in missing.items():
        for source in sources:
            dependents.setdefault(source, []).append(uid)
    ready = deque(dependents.keys() - missing.keys())
    while ready:
        done = ready.popleft()
        for uid in dependents.get(done, ()):
            missing[uid].discard(done)
            if not missing[uid]:
                del missing[uid]
                ready.append(uid)
    if missing:
        names = ", ".join(batch[uid].name or uid for uid in list(missing)[:10])
        raise InvalidTask(f"these tasks wait for each other in a circle: {names}. Remove one of the references.")
