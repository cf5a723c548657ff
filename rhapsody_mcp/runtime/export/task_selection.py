"""Chooses the tasks that a script repeats, and their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from types import MappingProxyType

from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.export.task_code import TaskCode, top_level
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of

__all__ = ["also_after", "by_need", "repeatable", "submissions", "unwritable"]


def repeatable(tasks: Sequence[Task]) -> list[Task]:
    """The tasks without those that were canceled, and without replaced ones that none of the others uses."""
    dropped: set[str] = set()
    by_source = list(by_need(tasks))
    for task in by_source:
        without_items = isinstance(task, ForEach) and task.source is not None and task.source.task.uid in dropped
        if without_items or _was_canceled(task, dropped):
            dropped.add(task.uid)
    used: set[str] = set()
    for task in reversed(by_source):
        if task.replaced_by is not None and task.uid not in used:
            dropped.add(task.uid)
        if task.uid not in dropped:
            used.update(top_level(source).uid for source in task.sources())
    return [task for task in tasks if task.uid not in dropped]


def _was_canceled(task: Task, dropped: Collection[str]) -> bool:
    """On request, or because of tasks that are not there again. Some of a for_each may have ended before that."""
    if isinstance(task, ForEach) and any(child.state is TaskState.DONE for child in task.children):
        return False
    if task.cause is not Cause.UPSTREAM:
        return task.cause is Cause.CANCELED
    sources = [top_level(source) for source in task.sources()]
    return any(
        source.uid in dropped or (source.replaced_by and source.state is not TaskState.DONE) for source in sources
    )


def also_after(tasks: Sequence[Task], kept: Collection[str]) -> dict[str, list[Task]]:
    """By the uid of a task: those that it comes after because of what came in between and is not kept."""
    predecessors: dict[str, list[Task]] = {}
    for task in by_need(tasks):
        missing = [source for source in map(top_level, task.sources()) if source.uid not in kept]
        before = {task.uid: task for source in missing for task in predecessors.get(source.uid, ())}
        if task.uid not in kept:
            before |= {source.uid: source for source in map(top_level, task.sources()) if source.uid in kept}
        predecessors[task.uid] = list(before.values())
    return {uid: before for uid, before in predecessors.items() if uid in kept and before}


def unwritable(tasks: Sequence[Task]) -> dict[str, str]:
    """What cannot be written as code, and what needs such, by uid: with a sentence that says why."""
    code = TaskCode({task.uid: "task" for task in tasks}, defaultdict(lambda: "function"))
    reasons: dict[str, str] = {}
    for task in by_need(tasks):
        name = name_of(task)
        if missing := [name_of(source) for source in map(top_level, task.sources()) if source.uid in reasons]:
            reasons[task.uid] = _one_line(f"{name} is left out: it needs {missing[0]}")
            continue
        try:
            code.write(task, None)
        except Exception as error:  # one task must not take the script from the others
            reasons[task.uid] = _one_line(f"{name} is left out, it cannot be written as code: {error}")
    return reasons


def submissions(tasks: Sequence[Task]) -> Iterator[tuple[list[Task], list[Task]]]:
    """The tasks in order, in lots; each with those of earlier lots that had ended when it was submitted."""
    batch: list[Task] = []
    before: list[Task] = []
    ends: list[tuple[float, int]] = []
    for number, task in enumerate(tasks):
        ended = []
        while ends and task.submitted is not None and ends[0][0] <= task.submitted:
            ended.append(heappop(ends)[1])
        if ended:
            yield before, batch
            before, batch = [tasks[index] for index in sorted(ended)], []
        batch.append(task)
        if task.outcome is not None:
            heappush(ends, (task.outcome.ended, number))
    if batch:
        yield before, batch


def by_need(tasks: Sequence[Task], also_after: Mapping[str, Sequence[Task]] = MappingProxyType({})) -> Iterator[Task]:
    """The tasks, each after those of them that it waits for, else in their order."""
    index = {task.uid: number for number, task in enumerate(tasks)}
    needs = [[*map(top_level, task.sources()), *also_after.get(task.uid, ())] for task in tasks]
    missing = [{index[source.uid] for source in sources if source.uid in index} for sources in needs]
    dependents: dict[int, list[int]] = {}
    for number, sources in enumerate(missing):
        for source in sources:
            dependents.setdefault(source, []).append(number)
    ready = [number for number, sources in enumerate(missing) if not sources]
    heapify(ready)
    while ready:
        first = heappop(ready)
        yield tasks[first]
        for number in dependents.get(first, ()):
            missing[number].discard(first)
            if not missing[number]:
                heappush(ready, number)


def _one_line(text: str) -> str:
    return " ".join(text.split())
