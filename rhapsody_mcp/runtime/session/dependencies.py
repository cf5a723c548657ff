"""The tasks that wait for other tasks of the session."""

from __future__ import annotations

from rhapsody_mcp.runtime.tasks import Task

__all__ = ["Dependencies"]


class Dependencies:
    def __init__(self) -> None:
        self._open_sources: dict[str, set[str]] = {}
        self._dependents: dict[str, list[str]] = {}

    def add(self, task: Task) -> None:
        """Let the task wait for each of its sources that has not ended."""
        sources = task.sources()
        if sources and (unfinished := {source.uid for source in sources if not source.state.final}):
            self._open_sources[task.uid] = unfinished
            for uid in unfinished:
                self._dependents.setdefault(uid, []).append(task.uid)

    def is_waiting(self, task: Task) -> bool:
        return bool(self._open_sources.get(task.uid))

    def forget(self, task: Task) -> None:
        """Remove a task that has ended."""
        self._open_sources.pop(task.uid, None)

    def pop_dependents(self, task: Task) -> dict[str, bool]:
        """The uids of the tasks that waited for this task; True for a task that waits for nothing else."""
        ready = {}
        for uid in self._dependents.pop(task.uid, ()):
            open_sources = self._open_sources.get(uid, set())
            open_sources.discard(task.uid)
            ready[uid] = not open_sources
        return ready
