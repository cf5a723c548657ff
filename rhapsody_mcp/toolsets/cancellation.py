"""Which tasks a call cancels, and the question before they are many."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mcp.server.mcpserver import Elicit
from mcp.types import CallToolResult

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, name_of
from rhapsody_mcp.toolsets.replies.base import Reply, reply
from rhapsody_mcp.toolsets.tooling.confirmation import Asking, Confirm, Desk, Loss, ask_about, named_few

__all__ = ["CancelReport", "ask_to_cancel", "canceled_with", "chosen_tasks", "report_canceled"]

_CANCELED_UNASKED = 10
_NAMES_SHOWN = 20


class CancelReport(Reply):
    canceled: int
    had_ended: int
    still_ending: list[str]


def chosen_tasks(opened: OpenSession, tasks: list[str] | None, all_open: bool) -> list[Task]:
    """Raises InvalidRequest where a call says nothing, or two things."""
    if tasks is not None and all_open:
        raise InvalidRequest("tasks and all_open=true contradict each other; give one of them.")
    if tasks is None and not all_open:
        raise InvalidRequest("say which tasks to cancel: either tasks=[names], or all_open=true.")
    return opened.tasks(tasks) if tasks else opened.session.tasks


def canceled_with(chosen: Collection[Task], session_tasks: Sequence[Task]) -> list[Task]:
    """The tasks that the cancel of the chosen ones ends: they, and those that need them; for a for_each, its tasks."""
    dependents: dict[str, list[Task]] = {}
    for task in session_tasks:
        for source in task.sources() if task.on_upstream_failure == "cancel" else ():
            dependents.setdefault(source.uid, []).append(task)
    found: dict[str, Task] = {}
    pending = list(chosen)
    while pending:
        task = pending.pop()
        if task.uid not in found and not task.state.final:
            found[task.uid] = task
            pending += task.children if isinstance(task, ForEach) else ()
            for ended in (task, task.parent):  # a for_each fails with one of its tasks; the others go on
                pending += dependents.get(ended.uid, ()) if ended else ()
    return [task for task in leaves(session_tasks) if task.uid in found]


async def ask_to_cancel(
    session: str, tasks: list[str] | None, all_open: bool, force: bool, context: Asking
) -> Elicit[Confirm] | Confirm:
    opened = Desk.of(context).sessions.get(session)
    chosen = chosen_tasks(opened, tasks, all_open)
    if force:
        return Confirm()
    ending = canceled_with(chosen, opened.session.tasks)
    lost = ending if len(ending) > _CANCELED_UNASKED else []
    told = f"This cancels {len(lost)} tasks of {session} that have not ended ({named_few(lost)})."
    return ask_about(Loss(told, {task.uid for task in lost}), opened, "cancel_tasks", context)


def report_canceled(ending: Sequence[Task], had_ended: int) -> CallToolResult:
    """What came of a cancel of these tasks, besides some that had ended before."""
    data = CancelReport(
        canceled=sum(task.state is TaskState.CANCELED for task in ending),
        had_ended=had_ended + sum(task.state.final and task.state is not TaskState.CANCELED for task in ending),
        still_ending=[name_of(task) for task in ending if not task.state.final][:_NAMES_SHOWN],
    )
    text = f"{data.canceled} canceled, {data.had_ended} had ended before."
    if data.still_ending:
        text += f" Still ending: {', '.join(data.still_ending)}; see wait_tasks."
    return reply(text, data)
