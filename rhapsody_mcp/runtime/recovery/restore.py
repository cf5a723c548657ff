"""Restores the tasks of a session, with their outcomes, from the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import TaskRow
from rhapsody_mcp.model.errors import RhapsodyError, UnknownName
from rhapsody_mcp.runtime.dataflow.for_each_values import restored_items
from rhapsody_mcp.runtime.functions import RegisteredFunction
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.recovery.recorder import Submission
from rhapsody_mcp.runtime.requests.stored_request import read_stored_request
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, with_children

__all__ = ["restore"]

_TASKS_PER_STEP = 200


async def restore(opened: OpenSession, ledger: Ledger, key: str) -> None:
    """Restore a new session from the ledger, where it has this key, and run its unfinished tasks."""
    for function in await ledger.functions(key):
        source = Source(function.source, function.entry)
        opened.functions.add(
            RegisteredFunction(function.number, function.name, source, function.signature, function.docstring)
        )
    rows = await ledger.tasks(key)
    children: dict[str, list[TaskRow]] = {}
    for row in rows:
        if row.parent is not None:
            children.setdefault(row.parent, []).append(row)
    tasks, unreadable = await _restore_tasks(opened, [row for row in rows if row.parent is None], children)
    for submission in await ledger.submissions(key):
        found = (opened.find(uid) for uid in submission.uids)  # a for_each may have fewer tasks than it had
        submitted = tuple(task for task in found if task is not None)
        opened.submissions[submission.key] = Submission(submission.key, submission.asked, submitted)
    positions = {row.uid: row.position for row in rows if row.position is not None}
    ended = [task for task in with_children(tasks) if task.state.final]
    ended.sort(key=lambda task: positions.get(task.uid, 0))
    if opened.recorder is not None and positions:
        opened.recorder.skipped = max(positions.values()) + 1 - len(ended)
    opened.session.restore(tasks, ended, unreadable)


async def _restore_tasks(
    opened: OpenSession, rows: Sequence[TaskRow], children: dict[str, list[TaskRow]]
) -> tuple[list[Task], dict[str, str]]:
    """The tasks, and by uid the reasons why stored requests are unreadable.

    A task without a readable request is a ComputeTask with the executable "?", and has its state and result.
    """
    tasks: dict[str, Task] = {}
    unreadable: dict[str, str] = {}
    pending = list(rows)
    while pending:
        postponed: list[TaskRow] = []
        for number, row in enumerate(pending):
            try:
                task = read_stored_request(row.recipe, row.uid, opened)
            except UnknownName as error:
                postponed.append(row)
                unreadable[row.uid] = _UNREADABLE.format(error)
                continue
            except RhapsodyError as error:
                unreadable[row.uid] = _UNREADABLE.format(error)
                task = ComputeTask(executable="?", uid=row.uid)
            else:
                unreadable.pop(row.uid, None)
            tasks[row.uid] = _restored(opened, task, row, children)
            if number % _TASKS_PER_STEP == 0:
                await asyncio.sleep(0)  # other clients are served meanwhile
        if len(postponed) == len(pending):
            for row in postponed:
                tasks[row.uid] = _restored(opened, ComputeTask(executable="?", uid=row.uid), row, children)
            break
        pending = postponed[::-1]  # a call names its tasks in any order, mostly from first to last or the other way
    in_order = [tasks[row.uid] for row in rows]
    opened.add_tasks(in_order)
    return in_order, unreadable


_UNREADABLE = "it cannot be made again after the restart of the service: {}"


def _restored(opened: OpenSession, task: Task, row: TaskRow, children: dict[str, list[TaskRow]]) -> Task:
    """The task in the state that it had, known by its uid."""
    _restore_state(task, row)
    if isinstance(task, ForEach):
        _restore_children(task, children.get(task.uid, ()))
    opened.add_uid(task)
    return task


def _restore_children(parent: ForEach, rows: Sequence[TaskRow]) -> None:
    if rows and parent.source is not None:
        parent.make_children(restored_items(parent.source, len(rows)))
    by_uid = {row.uid: row for row in rows}
    for child in parent.children:
        if (row := by_uid.get(child.uid)) is not None:
            _restore_state(child, row)


def _restore_state(task: Task, row: TaskRow) -> None:
    """Set the state that the task had in the previous run."""
    if (earlier := row.retries - task.retries) > 0:
        task.earlier_attempts = earlier
    task.submitted = row.submitted
    if row.last_failure:
        task.last_failure = row.last_failure
    task.attempts = max(row.attempts, task.earlier_attempts)
    if row.outcome is not None:
        task.state, task.outcome, task.started = row.outcome.state, row.outcome, row.outcome.started
        if row.outcome.progress is not None:
            task.progress = row.outcome.progress
        if row.started is None and task.started is not None and not isinstance(task, ForEach):
            task.attempts += 1  # the start was reported together with the end
    elif row.started is not None and not isinstance(task, ForEach):
        task.attempts, task.is_resumed = row.attempts - 1, True  # this attempt may run on, in an allocation
