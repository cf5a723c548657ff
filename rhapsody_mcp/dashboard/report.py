"""The report of a session: the page with its data, in one file."""

from __future__ import annotations

from typing import Any

from rhapsody_mcp.dashboard.details import describe_task, row_of
from rhapsody_mcp.dashboard.page_text import report_html
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.tasks import ForEach, Task, is_hidden, leaves

__all__ = ["report_data", "write_report"]

_DETAILED = 2000
"""So many tasks that ended well are clickable; besides, all that did not, up to `_FAILURES`."""
_FAILURES = 5000
_OUTPUT_CHARS = 2000


def write_report(view: SessionView, more: dict[str, Any]) -> str:
    """The HTML text. `view` has caught up."""
    return report_html(report_data(view, more))


def report_data(view: SessionView, more: dict[str, Any]) -> dict[str, Any]:
    """What the page reads: a frame with every span, the rows of all tasks, and the details of the tasks that failed,
    and of the first and the longest of the others."""
    session, spans = view.session, view.spans
    tasks = [task for task in leaves(session.tasks) if not is_hidden(task)]
    numbers = {task.uid: number for number, task in enumerate(tasks)}
    ended = session.ended
    return {
        "head": view.head() | more,
        "block": {
            "reset": True,
            "lanes": spans.lanes,
            "order": spans.order(),
            "groups": spans.groups,
            **spans.block(0, len(spans)),
        },
        "tasks": _rows(tasks),
        "rows": [numbers.get(ended[index].uid, -1) for index in spans.index],
        "details": {task.uid: describe_task(task, _OUTPUT_CHARS) for task in _detailed(tasks, session.tasks)},
    }


def _rows(tasks: list[Task]) -> dict[str, Any]:
    """The rows of the table, with their fields named once; times to the microsecond."""
    rows = [row_of(task) for task in tasks]
    fields = list(rows[0]) if rows else []
    rounded = ([round(value, 6) if type(value) is float else value for value in row.values()] for row in rows)
    return {"fields": fields, "rows": list(rounded)}


def _detailed(tasks: list[Task], top: list[Task]) -> list[Task]:
    failed = [task for task in tasks if task.state in (TaskState.FAILED, TaskState.CANCELED)][:_FAILURES]
    others = [task for task in tasks if task.state not in (TaskState.FAILED, TaskState.CANCELED)]
    if len(others) > _DETAILED:
        longest = sorted(others, key=lambda task: -(task.timing.execution_s or 0.0))
        others = [*others[: _DETAILED // 2], *longest[: _DETAILED // 2]]
    parents = [task for task in top if isinstance(task, ForEach)][:_DETAILED]
    return list({task.uid: task for task in (*failed, *others, *parents)}.values())
