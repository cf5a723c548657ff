"""Which tasks wait for which."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["leads_to", "refuse_cycles"]


def leads_to(task: Task, sought: Task) -> bool:
    """Whether `task` waits for the sought one, or is it."""
    pending, seen = [task], set[str]()
    while pending:
        one = pending.pop()
        if one is sought:
            return True
        if one.uid not in seen and not one.state.final:
            seen.add(one.uid)
            pending += one.sources()
    return False


def refuse_cycles(tasks: Sequence[Task]) -> None:
    """Raise InvalidTask where tasks of one submission wait for each other in a circle."""
    batch = {task.uid: task for task in tasks}
    missing = {
        uid: inside
        for uid, task in batch.items()
        if (needed := task.sources()) and (inside := {source.uid for source in needed if source.uid in batch})
    }
    needed_by: dict[str, list[str]] = {}
    for uid, sources in missing.items():
        for source in sources:
            needed_by.setdefault(source, []).append(uid)
    free = deque(needed_by.keys() - missing.keys())
    while free:
        done = free.popleft()
        for uid in needed_by.get(done, ()):
            missing[uid].discard(done)
            if not missing[uid]:
                del missing[uid]
                free.append(uid)
    if missing:
        names = ", ".join(batch[uid].name or uid for uid in list(missing)[:10])
        raise InvalidTask(f"these tasks wait for each other in a circle: {names}. Remove one of the references.")
