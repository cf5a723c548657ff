"""Computes the statistics of a session. A task that has ended is added once, when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.statistics import Places, Statistics, Tally
from rhapsody_mcp.model.task_totals import Row
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, is_hidden, kind_of, leaves, name_of

__all__ = ["StatisticsCollector"]

_BATCH_TASKS = 1000  # ended tasks are added in batches of at least this size


class StatisticsCollector:
    """The statistics of one session. `ended` grows at its end; `unfinished` are the tasks that have not ended.

    Replaced tasks do not count. Of a ForEach with children, the children count.
    """

    def __init__(self, ended: Sequence[Task], unfinished: Mapping[str, Task], tasks: Mapping[str, Task]) -> None:
        self._ended, self._unfinished, self._tasks = ended, unfinished, tasks
        self.count_anew()

    def count_anew(self) -> None:
        """Count again from the first end, as when tasks that had ended run again."""
        self._tally, self._added_count = Tally(), 0

    def discard(self, task: Task) -> None:
        """Stop counting a task that was replaced."""
        if any(leaf.position is not None and leaf.position < self._added_count for leaf in leaves([task])):
            self.count_anew()

    def add_ended(self, min_tasks: int = _BATCH_TASKS) -> None:
        """Add the tasks that have ended since the last call, if they are at least `min_tasks`."""
        if len(self._ended) - self._added_count >= min_tasks:
            ended = enumerate(self._ended[self._added_count :], self._added_count)
            self._added_count = len(self._ended)
            self._tally.add(_row(task) for position, task in ended if task.position == position and _counts(task))

    def compute(self, backends: Sequence[Backend], group: str | None) -> Statistics:
        """The statistics of all tasks, or of one group. Raises UnknownName where no task is in this group."""
        self.add_ended(1)
        unfinished = (_row(task) for task in self._unfinished.values() if _counts(task))
        return self._tally.statistics(unfinished, self._find_row, self._source_uids, _places(backends), group)

    def _find_row(self, uid: str) -> Row | None:
        task = self._tasks.get(uid)
        return _row(task) if task is not None and _counts(task) else None

    def _source_uids(self, uid: str) -> list[str]:
        """The uids of the tasks that a task waited for. The children stand for a ForEach."""
        task = self._tasks[uid]
        parent = task.parent
        waited = parent.sources() if isinstance(parent, ForEach) and parent.source is not None else ()
        return [source.uid for source in leaves([*task.sources(), *waited])]


def _counts(task: Task) -> bool:
    if (task.parent or task).replaced_by is not None or is_hidden(task):
        return False
    return not (isinstance(task, ForEach) and task.children)


def _row(task: Task) -> Row:
    return Row(
        uid=task.uid,
        name=task.name,
        kind=kind_of(task),
        state=task.counted_as,
        timing=task.timing,
        for_each=name_of(task.parent) if task.parent else None,
        backend=task.backend or "",
        cores=task.layout.cores if isinstance(task, ComputeTask) and task.layout.groups else 0,
        usage=task.outcome.usage if task.outcome else None,
        measured=task.outcome.measured if task.outcome else None,
        nodes=task.nodes,
    )


def _places(backends: Sequence[Backend]) -> dict[str, Places]:
    """The workers and cores of each backend that has workers."""
    return {
        backend.name: Places(backend.num_workers, backend.num_cores or backend.num_workers)
        for backend in backends
        if backend.num_workers is not None
    }
