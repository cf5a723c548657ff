"""The report of a session: the page with its data, in one file."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from rhapsody_mcp.dashboard.details import describe_task, row_of
from rhapsody_mcp.dashboard.page_text import report_html
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.tasks import ForEach, Task, is_hidden, leaves

__all__ = ["report_data", "write_report", "write_report_in_steps"]

_DETAILED = 2000
"""So many tasks that ended well are clickable; besides, all that did not, up to `_FAILURES`."""
_FAILURES = 5000
_OUTPUT_CHARS = 2000
_TASKS_A_STEP = 500


def write_report(view: SessionView, more: dict[str, Any]) -> str:
    """The HTML text. `view` has caught up."""
    return report_html(report_data(view, more))


async def write_report_in_steps(view: SessionView, more: dict[str, Any]) -> str:
    """As `write_report`; other work of the event loop goes on meanwhile."""
    await view.catch_up()
    data: dict[str, Any] = {}
    for step in _steps(view, more):
        data = step or {}
        await asyncio.sleep(0)
    return await asyncio.to_thread(report_html, data)


def report_data(view: SessionView, more: dict[str, Any]) -> dict[str, Any]:
    """What the page reads: a frame with every span, the rows of all tasks, and the details of the tasks that failed,
    and of the first and the longest of the others."""
    return next(step for step in _steps(view, more) if step is not None)


def _steps(view: SessionView, more: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """None after each step, and at last the data."""
    session, spans = view.session, view.spans
    tasks = [task for task in leaves(session.tasks) if not is_hidden(task)]
    numbers = {task.uid: number for number, task in enumerate(tasks)}
    ended = session.ended
    head = view.head() | more
    yield None
    rows, details = list[list[Any]](), dict[str, Any]()
    for first in range(0, len(tasks), _TASKS_A_STEP):
        rows += map(_row, tasks[first : first + _TASKS_A_STEP])
        yield None
    detailed = _detailed(tasks, session.tasks)
    for first in range(0, len(detailed), _TASKS_A_STEP):
        details |= {task.uid: describe_task(task, _OUTPUT_CHARS) for task in detailed[first : first + _TASKS_A_STEP]}
        yield None
    yield {
        "head": head,
        "block": spans.since(),
        "tasks": {"fields": list(row_of(tasks[0])) if tasks else [], "rows": rows},
        "rows": [numbers.get(ended[index].uid, -1) for index in spans.index],
        "details": details,
    }


def _row(task: Task) -> list[Any]:
    """The row of the table without the names of its fields; times to the microsecond."""
    return [round(value, 6) if type(value) is float else value for value in row_of(task).values()]


def _detailed(tasks: list[Task], top: list[Task]) -> list[Task]:
    failed = [task for task in tasks if task.state in (TaskState.FAILED, TaskState.CANCELED)][:_FAILURES]
    others = [task for task in tasks if task.state not in (TaskState.FAILED, TaskState.CANCELED)]
    if len(others) > _DETAILED:
        longest = sorted(others, key=lambda task: -(task.timing.execution_s or 0.0))
        others = [*others[: _DETAILED // 2], *longest[: _DETAILED // 2]]
    parents = [task for task in top if isinstance(task, ForEach)][:_DETAILED]
    return list({task.uid: task for task in (*failed, *others, *parents)}.values())
