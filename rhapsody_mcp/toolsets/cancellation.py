"""Which tasks a call of `cancel_tasks` ends, the question before they are many, and the reply."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mcp.server.mcpserver import Elicit
from mcp.types import CallToolResult

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, name_of
from rhapsody_mcp.toolsets.replies.base import Reply, reply
from rhapsody_mcp.toolsets.replies.formatting import NAMES_SHOWN, limited_list
from rhapsody_mcp.toolsets.tooling.confirmation import (
    CallContext,
    Confirm,
    Loss,
    ServerState,
    ask_before_loss,
    task_names,
)

__all__ = ["CancelReport", "ask_to_cancel", "cancel_report", "tasks_to_cancel", "with_dependents"]

_CANCELED_WITHOUT_QUESTION = 10


class CancelReport(Reply):
    canceled: int
    had_ended: int
    still_ending: list[str]


def tasks_to_cancel(open_session: OpenSession, names: list[str] | None, all_open: bool) -> list[Task]:
    """Raises InvalidRequest where a call gives neither names nor all_open, or both."""
    if names is not None and all_open:
        raise InvalidRequest("tasks and all_open=true contradict each other; give one of them.")
    if names is None and not all_open:
        raise InvalidRequest("say which tasks to cancel: either tasks=[names], or all_open=true.")
    return open_session.tasks(names) if names else open_session.session.tasks


def with_dependents(canceled: Collection[Task], session_tasks: Sequence[Task]) -> list[Task]:
    """The open tasks that a cancellation of `canceled` ends: these tasks, the children of each for_each, and every task
    that needs one of them."""
    dependents: dict[str, list[Task]] = {}
    for task in session_tasks:
        for source in task.sources() if task.on_upstream_failure == "cancel" else ():
            dependents.setdefault(source.uid, []).append(task)
    ending: dict[str, Task] = {}
    pending = list(canceled)
    while pending:
        task = pending.pop()
        if task.uid not in ending and not task.state.final:
            ending[task.uid] = task
            pending += task.children if isinstance(task, ForEach) else ()
            for ended in (task, task.parent):  # a for_each fails with one of its tasks; the others go on
                pending += dependents.get(ended.uid, ()) if ended else ()
    return [task for task in leaves(session_tasks) if task.uid in ending]


async def ask_to_cancel(
    session: str, tasks: list[str] | None, all_open: bool, force: bool, context: CallContext
) -> Elicit[Confirm] | Confirm:
    open_session = ServerState.of(context).sessions.get(session)
    canceled = tasks_to_cancel(open_session, tasks, all_open)
    if force:
        return Confirm()
    ending = with_dependents(canceled, open_session.session.tasks)
    lost = ending if len(ending) > _CANCELED_WITHOUT_QUESTION else []
    sentence = f"This cancels {len(lost)} tasks of {session} that have not ended ({task_names(lost)})."
    return ask_before_loss(Loss(sentence, {task.uid for task in lost}), open_session, "cancel_tasks", context)


def cancel_report(ending: Sequence[Task], had_ended: int) -> CallToolResult:
    """The reply for a cancellation that ended `ending`, where `had_ended` tasks had ended before."""
    data = CancelReport(
        canceled=sum(task.state is TaskState.CANCELED for task in ending),
        had_ended=had_ended + sum(task.state.final and task.state is not TaskState.CANCELED for task in ending),
        still_ending=[name_of(task) for task in ending if not task.state.final][:NAMES_SHOWN],
    )
    text = f"{data.canceled} canceled, {data.had_ended} had ended before."
    waiting = [name_of(task) for task in ending if task.state is TaskState.WAITING]
    others = [name_of(task) for task in ending if not task.state.final and task.state is not TaskState.WAITING]
    if others:
        text += f" Still ending: {', '.join(others[:NAMES_SHOWN])}; see wait_tasks."
    if waiting:
        text += f" Canceled once the rest of what they wait for has ended: {limited_list(waiting, NAMES_SHOWN)}."
    return reply(text, data)
