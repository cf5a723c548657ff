"""Runs tasks again in place: which tasks a retry is about, and how each forgets its end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of, with_children

__all__ = ["JoinsResults", "attempts_before", "forget_end", "is_outdated", "tasks_to_run_again"]

_BECAUSE_OF_OTHERS = (Cause.UPSTREAM, Cause.SKIPPED)


class JoinsResults(InvalidTask):
    """Tasks of `parent` cannot run again yet: all have ended, and the results of the ForEach are put together."""

    def __init__(self, parent: ForEach) -> None:
        super().__init__(f"{name_of(parent)} puts its results together now; call wait_tasks, then run it again.")
        self.parent = parent


def tasks_to_run_again(named: Sequence[Task], session_tasks: Sequence[Task]) -> list[Task]:
    """What runs again with the named tasks: of a for_each its tasks that did not end well; what these need and did not
    get; and all that was canceled or skipped because of any of these. A named task that is DONE runs again where one of
    its sources does, or did since. In the order of submission, a ForEach after its children.

    Raises InvalidTask for a task whose name another one has taken, or that needs such a task.
    """
    every = list(with_children(session_tasks))
    dependents: dict[str, list[Task]] = {}
    for task in every:
        for source in task.sources() if task.cause in _BECAUSE_OF_OTHERS else ():
            dependents.setdefault(source.uid, []).append(task)
    again: set[str] = set()
    pending = list(_with_missing_sources(task for one in named for task in _failed_parts(one)))
    while pending or (pending := [task for task in named if task.uid not in again and is_outdated(task, again)]):
        task = pending.pop()
        if task.uid not in again:
            _refuse_impossible(task)
            again.add(task.uid)
            pending += filter(_has_its_name, dependents.get(task.uid, ()))
            pending += [task.parent] if task.parent is not None and task.parent.state.final else ()
    return [task for task in every if task.uid in again]


def is_outdated(task: Task, again: Collection[str]) -> bool:
    """Whether a task that is DONE used, or did without, the result of a task that runs again or did so since."""
    if task.state is not TaskState.DONE or isinstance(task, ForEach) or task.parent is not None:
        return False
    return any(
        source.uid in again or source.position is None or source.position > (task.position or 0)
        for source in task.sources()
    )


def _did_not_end_well(task: Task) -> bool:
    return task.state in (TaskState.FAILED, TaskState.CANCELED) and task.cause is not Cause.SKIPPED


def _failed_parts(task: Task) -> Iterator[Task]:
    """The children of a ForEach that did not end well, and the task itself where it did not."""
    if isinstance(task, ForEach):
        yield from filter(_did_not_end_well, task.children)
    if _did_not_end_well(task):
        yield task


def _with_missing_sources(tasks: Iterable[Task]) -> Iterator[Task]:
    """The tasks, and what they need and did not get, also through other tasks."""
    pending, seen = list(tasks), set[str]()
    while pending:
        task = pending.pop()
        if task.uid not in seen:
            seen.add(task.uid)
            yield task
            for source in task.sources() if task.on_upstream_failure == "cancel" else ():
                pending += _failed_parts(source)


def _has_its_name(task: Task) -> bool:
    return (task.parent or task).replaced_by is None


def _refuse_impossible(task: Task) -> None:
    if not _has_its_name(task):
        raise InvalidTask(
            f"{name_of(task)} ({task.uid}) cannot run again: {(task.parent or task).replaced_by} has taken its name. "
            "Submit what needs it again, under its own name."
        )
    parent = task.parent
    if isinstance(parent, ForEach) and not parent.state.final and all(one.state.final for one in parent.children):
        raise JoinsResults(parent)


def attempts_before(task: Task) -> int:
    """The attempts that a task has had when it runs again. A backend may have had it although it never started."""
    is_sure = task.cause in _BECAUSE_OF_OTHERS or isinstance(task, ForEach)
    return task.attempts if is_sure else max(1, task.attempts)


def forget_end(task: Task, now: float) -> None:
    """Make an ended task one that waits since now. Its attempts go on counting, and it has all its retries anew."""
    was_sent = task.attempts > 0
    task.attempts = attempts_before(task)
    if task.attempts:
        task.earlier_attempts = task.attempts
    if was_sent and task.outcome is not None and task.cause is not None and task.cause not in _BECAUSE_OF_OTHERS:
        task.last_failure = f"attempt {task.attempts} ended with cause {task.cause}: {task.outcome.error}"
    task.state, task.submitted = TaskState.WAITING, now
    task.outcome = task.started = task.position = task.return_value = task.stdout = task.stderr = None
    task.ranks = ()
    if task.raised is not None:
        task.raised = None
    task.forget_progress()
    task.forget_future()
