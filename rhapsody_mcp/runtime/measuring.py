"""Measures the tasks of a session: makes of each the row that statistics are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.specs import Call, Command, TaskSpec
from rhapsody_mcp.model.statistics import Row, Statistics, summarise
from rhapsody_mcp.runtime.tasks import Task, leaves, name_of

__all__ = ["measure"]


def measure(
    tasks: Iterable[Task], specs: Mapping[str, TaskSpec], backends: Sequence[Backend], group: str | None
) -> Statistics:
    """Statistics of these tasks, with the children of a ForEach in its place, or of one group of them."""
    counted = {task.uid: task for task in leaves(tasks)}
    rows = [_row(task, specs.get(uid)) for uid, task in counted.items()]
    return summarise(rows, lambda uid: _waited_for(counted[uid]), _workers(backends), group)


def _row(task: Task, spec: TaskSpec | None) -> Row:
    return Row(
        uid=task.uid,
        name=task.name,
        kind=_kind(spec),
        state=task.state,
        timing=task.timing,
        for_each=name_of(task.parent) if task.parent else None,
        backend=task.backend or "",
        ranks=0 if spec is None or spec.layout.mode == "native" else max(1, spec.layout.ranks),
        usage=task.outcome.usage if task.outcome else None,
    )


def _kind(spec: TaskSpec | None) -> str:
    if spec is None:
        return "for_each"
    if isinstance(spec.work, Call):
        return "function"
    return "executable" if isinstance(spec.work, Command) else "prompt"


def _waited_for(task: Task) -> list[str]:
    """The uids of the tasks that it waited for, a ForEach by its children."""
    sources = task.sources()
    if task.parent is not None and task.parent.source is not None:
        sources += task.parent.sources()
    return [source.uid for source in leaves(sources)]


def _workers(backends: Sequence[Backend]) -> dict[str, int]:
    """By backend, where it has any."""
    described = {backend.name: backend.describe() for backend in backends}
    return {name: told["num_workers"] for name, told in described.items() if "num_workers" in told}
