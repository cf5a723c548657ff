"""Gives waiting tasks other priorities for `submit_tasks`, and tells where they stand now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mcp.types import CallToolResult

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import MOST_PRIORITY, Task, leaves, name_of, tasks_text
from rhapsody_mcp.toolsets.replies.base import count_states, reply
from rhapsody_mcp.toolsets.replies.formatting import call_text, counts_text, limited_list
from rhapsody_mcp.toolsets.submission.report import SubmissionReport

__all__ = ["prioritize"]

_NAMES_SHOWN = 10


def _waits(task: Task) -> bool:
    return task.state in (TaskState.WAITING, TaskState.QUEUED)


async def prioritize(open_session: OpenSession, priorities: Mapping[str, int]) -> CallToolResult:
    """Change the priorities. Raises UnknownName, and InvalidTask where a task has ended, with nothing changed; the
    reply tells of a task that has ended meanwhile."""
    async with open_session.naming_lock:
        tasks = {name: open_session.task(name) for name in priorities}
        for name, task in tasks.items():
            if abs(priorities[name]) > MOST_PRIORITY:
                raise InvalidTask(
                    f"the priority of {name} is {priorities[name]}; valid is {-MOST_PRIORITY} to {MOST_PRIORITY}.",
                    field="reprioritize",
                )
            if task.state.final:
                raise InvalidTask(
                    f"{name} has ended {task.counted_as}: its priority does nothing.", field="reprioritize"
                )
        waiting = {name for name, task in tasks.items() if any(_waits(one) for one in leaves([task]))}
        await open_session.prioritize([(task, priorities[name]) for name, task in tasks.items()])
    singles = [task for task in leaves(tasks.values()) if not task.state.final]
    data = SubmissionReport(
        session=open_session.id,
        submitted=0,
        first=next(iter(tasks.values())).uid,
        last=next(reversed(tasks.values())).uid,
        names={name_of(task): task.uid for task in tasks.values()},
        counts=count_states(singles),
        backends=dict(Counter(task.backend or "" for task in singles)),
    )
    given = ", ".join(f"{name} {priority}" for name, priority in priorities.items())
    text = f"Priorities: {given}; {tasks_text(len(singles))} of them open ({counts_text(data.counts)})."
    if running := [name for name, task in tasks.items() if name not in waiting and not task.state.final]:
        text += f" No effect on what runs already: {limited_list(running, _NAMES_SHOWN)}."
    if ended := [name for name, task in tasks.items() if task.state.final]:
        text += f" Ended meanwhile: {limited_list(ended, _NAMES_SHOWN)}."
    return reply(f"{text}\nNext: {call_text('wait_tasks', session=open_session.id)}.", data)
