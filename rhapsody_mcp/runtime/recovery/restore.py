"""Makes the tasks of a session again that a ledger holds, each with what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import TaskRow
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.runtime.dataflow.for_each_values import items_again
from rhapsody_mcp.runtime.functions import Registered
from rhapsody_mcp.runtime.recovery.recorder import Submission
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, with_children

if TYPE_CHECKING:
    from rhapsody_mcp.runtime.session_registry import OpenSession

__all__ = ["ReadRecipe", "Records", "restore"]

ReadRecipe = Callable[[bytes, str, "OpenSession"], Task]
"""Makes the task of a recipe, under this uid; raises RhapsodyError where it cannot."""
_AT_ONCE = 200


class Records(NamedTuple):
    """What sessions are written into: the ledger, a folder for long results, and how a task is read back."""

    ledger: Ledger
    folder: Path
    read_recipe: ReadRecipe


async def restore(opened: OpenSession, records: Records, key: str) -> None:
    """Give a session that was just made everything that the ledger holds under this key, and run what had not ended."""
    for kept in await records.ledger.functions(key):
        source = Source(kept.source, kept.entry)
        opened.functions.keep(Registered(kept.number, kept.name, source, kept.signature, kept.docstring))
    rows = await records.ledger.tasks(key)
    children: dict[str, list[TaskRow]] = {}
    for row in rows:
        if row.parent is not None:
            children.setdefault(row.parent, []).append(row)
    tasks, unreadable = await _make(opened, records, [row for row in rows if row.parent is None], children)
    for submission in await records.ledger.submissions(key):
        made = tuple(opened.by_uid(uid) for uid in submission.uids)
        opened.submissions[submission.key] = Submission(submission.key, submission.asked, made)
    positions = {row.uid: row.position for row in rows if row.position is not None}
    ended = [task for task in with_children(tasks) if task.state.final]
    ended.sort(key=lambda task: positions.get(task.uid, 0))
    if opened.recorder is not None and positions:
        opened.recorder.skipped = max(positions.values()) + 1 - len(ended)
    opened.session.restore(tasks, ended, unreadable)


async def _make(
    opened: OpenSession, records: Records, rows: Sequence[TaskRow], children: dict[str, list[TaskRow]]
) -> tuple[list[Task], dict[str, str]]:
    """The tasks, and why those that cannot be made again cannot: these stand there as programs of no name, with the
    results that they had."""
    tasks: list[Task] = []
    unreadable: dict[str, str] = {}
    for number, row in enumerate(rows):
        try:
            task = records.read_recipe(row.recipe, row.uid, opened)
        except RhapsodyError as error:
            unreadable[row.uid] = f"it cannot be made again after the restart of the service: {error}"
            task = ComputeTask(executable="?", uid=row.uid)
        _give(task, row)
        if isinstance(task, ForEach):
            _make_children(task, children.get(task.uid, ()))
        opened.have([task])
        tasks.append(task)
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)  # others are served meanwhile
    return tasks, unreadable


def _make_children(parent: ForEach, rows: Sequence[TaskRow]) -> None:
    if rows and parent.source is not None:
        parent.make_children(items_again(parent.source, len(rows)))
    by_uid = {row.uid: row for row in rows}
    for child in parent.children:
        if (row := by_uid.get(child.uid)) is not None:
            _give(child, row)


def _give(task: Task, row: TaskRow) -> None:
    """What it had in its earlier life."""
    task.submitted, task.attempts, task.last_failure = row.submitted, row.attempts, row.last_failure
    if row.outcome is not None:
        task.state, task.outcome, task.started = row.outcome.state, row.outcome, row.outcome.started
        if row.started is None and task.started is not None and not isinstance(task, ForEach):
            task.attempts += 1  # its start was heard of with its end
