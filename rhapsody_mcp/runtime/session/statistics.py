"""Measures the tasks of a session: makes of each the row that statistics are computed from, once when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.statistics import Row, Statistics, Tally
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, is_hidden, kind_of, leaves, name_of

__all__ = ["Account"]

_AT_LEAST = 1000  # that have ended until the next time that they are added up


class Account:
    """Of the tasks of one session: `ended` grows at its end, `going` are those that have not ended. Tasks that were
    replaced do not count, and a ForEach with children is these."""

    def __init__(self, ended: Sequence[Task], going: Mapping[str, Task], tasks: Mapping[str, Task]) -> None:
        self._ended, self._going, self._tasks = ended, going, tasks
        self._forget()

    def _forget(self) -> None:
        self._tally, self._added = Tally(), 0

    def replaced(self, task: Task) -> None:
        """It counted, and does not any more."""
        if any(one.position is not None and one.position < self._added for one in leaves([task])):
            self._forget()

    def add_up(self, least: int = _AT_LEAST) -> None:
        """Add up what has ended, if it is so much."""
        if len(self._ended) - self._added >= least:
            ended = self._ended[self._added :]
            self._added = len(self._ended)
            self._tally.add(_row(task) for task in ended if _counts(task))

    def statistics(self, backends: Sequence[Backend], group: str | None) -> Statistics:
        """Raises UnknownName where there is no such group."""
        self.add_up(1)
        going = (_row(task) for task in self._going.values() if _counts(task))
        return self._tally.statistics(going, self._find, self._waited_for, _workers(backends), group)

    def _find(self, uid: str) -> Row | None:
        task = self._tasks.get(uid)
        return _row(task) if task is not None and _counts(task) else None

    def _waited_for(self, uid: str) -> list[str]:
        """The uids of the tasks that it waited for, a ForEach by its children."""
        task = self._tasks[uid]
        parent = task.parent
        waited = parent.sources() if parent is not None and parent.source is not None else ()
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
        state=task.state,
        timing=task.timing,
        for_each=name_of(task.parent) if task.parent else None,
        backend=task.backend or "",
        ranks=task.layout.ranks if isinstance(task, ComputeTask) else 0,
        usage=task.outcome.usage if task.outcome else None,
    )


def _workers(backends: Sequence[Backend]) -> dict[str, int]:
    """By backend, where it has any."""
    return {backend.name: backend.num_workers for backend in backends if backend.num_workers is not None}
