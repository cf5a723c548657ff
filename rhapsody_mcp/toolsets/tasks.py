"""The tools that submit tasks, wait for them, and show what came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import anyio
from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_sessions import OpenSession, OpenSessions
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.replies import Reply, TaskRow, counts_text, name_of, reply, task_row
from rhapsody_mcp.toolsets.requests import TaskRequest, label_of, make_tasks
from rhapsody_mcp.toolsets.results import TaskResult, show_result
from rhapsody_mcp.toolsets.sessions import SessionId
from rhapsody_mcp.toolsets.waiting import Mode, Waited, engine_states, report, wait_for

__all__ = ["Tasks"]

State = Literal["open", "WAITING", "QUEUED", "RUNNING", "DONE", "FAILED", "CANCELED"]
_CANCEL_WAIT_S = 15.0
_NAMES_SHOWN = 20


class Submitted(Reply):
    session: str
    submitted: int
    first: Annotated[str, Field(description="Id of the first task; the others count on from it, in order.")]
    last: str
    names: Annotated[dict[str, str], Field(description="Ids by name, where they are few.")]
    counts: dict[str, int]
    backends: Annotated[dict[str, int], Field(description="Tasks by backend.")]


class TaskPage(Reply):
    session: str
    total: Annotated[int, Field(description="Tasks that match.")]
    tasks: list[TaskRow]
    has_more: bool
    next_cursor: str | None = None


class CancelReport(Reply):
    session: str
    canceled: int
    had_ended: Annotated[int, Field(description="Tasks that had ended before, and stay as they are.")]
    still_ending: list[str]


class Tasks:
    def __init__(self, sessions: OpenSessions, settings: Settings) -> None:
        self._sessions, self._settings = sessions, settings

    async def submit_tasks(
        self,
        session: SessionId,
        tasks: Annotated[list[TaskRequest], Field(min_length=1, description="The tasks, in any order.")],
    ) -> Annotated[CallToolResult, Submitted]:
        opened = self._sessions.get(session)
        made = make_tasks(tasks, opened)
        await _submit(opened, tasks, made)
        data = Submitted(
            session=session,
            submitted=len(made),
            first=made[0].uid,
            last=made[-1].uid,
            names=_few_names(made),
            counts=dict(Counter(task.state.value for task in made)),
            backends=dict(Counter(task.backend or "" for task in made)),
        )
        return reply(_submitted_text(data), data)

    async def wait_tasks(
        self,
        session: SessionId,
        context: Context[Any, Any],
        tasks: Annotated[
            list[str] | None,
            Field(description='Names or ids, e.g. ["train", "task.000007"]; default is every task of the session.'),
        ] = None,
        mode: Annotated[Mode, Field(description='"all", or "any": return when one more has ended.')] = "all",
        timeout_s: Annotated[
            float | None,
            Field(ge=0, allow_inf_nan=False, description="Seconds to wait, default 25; cut at the server's cap."),
        ] = None,
    ) -> Annotated[CallToolResult, Waited]:
        opened = self._sessions.get(session)
        awaited = opened.session.tasks if tasks is None else opened.tasks(tasks)
        asked = self._settings.wait_default_s if timeout_s is None else timeout_s
        applied = min(asked, self._settings.wait_cap_s)
        backends = opened.session.backends

        async def tick(waited_s: float) -> None:
            ended = sum(task.state.final for task in awaited)
            states = [f"{name}: {state}" for name, state in engine_states(backends).items()]
            await context.report_progress(waited_s, applied, "; ".join([f"{ended} of {len(awaited)} ended", *states]))

        waited = await wait_for(awaited, timeout_s=applied, mode=mode, tick=tick)
        return report(session, awaited, backends, mode=mode, asked=asked, applied=applied, waited=waited)

    async def list_tasks(
        self,
        session: SessionId,
        state: Annotated[
            State | None, Field(description='Only these, e.g. "FAILED"; "open" for all not ended.')
        ] = None,
        name_contains: Annotated[str | None, Field(description='Only names with this in them, e.g. "sim-".')] = None,
        limit: Annotated[int, Field(ge=1, le=50, description="Most tasks in one reply.")] = 20,
        cursor: Annotated[str | None, Field(description="next_cursor of the reply before, for the next page.")] = None,
    ) -> Annotated[CallToolResult, TaskPage]:
        opened = self._sessions.get(session)
        matching = [task for task in opened.session.tasks if _matches(task, state, name_contains or "")]
        after = "" if cursor is None else _uid_of_cursor(opened, cursor)
        rest = [task for task in matching if task.uid > after]
        rows = [task_row(task) for task in rest[:limit]]
        more = len(rest) > limit
        page = TaskPage(
            session=session,
            total=len(matching),
            tasks=rows,
            has_more=more,
            next_cursor=rows[-1].task if more else None,
        )
        return reply(_page_text(page), page)

    async def get_result(
        self,
        session: SessionId,
        task: Annotated[str, Field(description='Its name or id, e.g. "train" or "task.000002".')],
        path: Annotated[str, Field(description='JSON Pointer to a part of the result, e.g. "/0/label".')] = "",
        rank: Annotated[
            int | None, Field(ge=0, description="One rank of a job, from 0, in place of the whole.")
        ] = None,
        max_bytes: Annotated[
            int | None, Field(ge=0, le=65536, description="Most bytes of the result to show, default 8192.")
        ] = None,
        output_bytes: Annotated[
            int, Field(ge=0, le=65536, description="Most bytes of the end of stdout, and of stderr, to show.")
        ] = 2048,
    ) -> Annotated[CallToolResult, TaskResult]:
        found = self._sessions.get(session).task(task)
        size = self._settings.result_bytes if max_bytes is None else max_bytes
        return await show_result(found, path=path, rank=rank, max_bytes=size, output_bytes=output_bytes)

    async def cancel_tasks(
        self,
        session: SessionId,
        tasks: Annotated[
            list[str] | None, Field(min_length=1, description='Names or ids, e.g. ["sim-3", "task.000007"].')
        ] = None,
        all_open: Annotated[bool, Field(description="true cancels every task that has not ended.")] = False,
    ) -> Annotated[CallToolResult, CancelReport]:
        opened = self._sessions.get(session)
        if tasks is not None and all_open:
            raise InvalidRequest("tasks and all_open=true contradict each other; give one of them.")
        if tasks is None and not all_open:
            raise InvalidRequest("say which tasks to cancel: either tasks=[names], or all_open=true.")
        chosen = opened.tasks(tasks or []) if tasks else opened.session.tasks
        still_open = [task for task in chosen if not task.state.final]
        with anyio.move_on_after(_CANCEL_WAIT_S):
            await opened.session.cancel(still_open)
        data = CancelReport(
            session=session,
            canceled=sum(task.state is TaskState.CANCELED for task in still_open),
            had_ended=len(chosen) - len(still_open),
            still_ending=[name_of(task) for task in still_open if not task.state.final][:_NAMES_SHOWN],
        )
        return reply(_cancel_text(data), data)


async def _submit(opened: OpenSession, requests: Sequence[TaskRequest], made: Sequence[Task]) -> None:
    """A refusal names a task by its place in the call: its id is taken only by a submission that is."""
    try:
        await opened.submit(made)
    except InvalidTask as error:
        for index, task in enumerate(made):
            told, named, rest = str(error).partition(f"{task.name or task.uid}: ")
            if named and not told:
                raise InvalidTask(f"{label_of(index, requests[index])}: {rest}") from error
        raise


def _uid_of_cursor(opened: OpenSession, cursor: str) -> str:
    try:
        return opened.task(cursor).uid
    except UnknownName:
        raise InvalidRequest(
            f"cursor {cursor[:64]!r} is no next_cursor of a reply; leave cursor out for the first page."
        ) from None


def _few_names(tasks: Sequence[Task]) -> dict[str, str]:
    """Of many it would be a long list of what the caller knows: ids count on in order."""
    named = {task.name: task.uid for task in tasks if task.name}
    return named if len(named) <= _NAMES_SHOWN else {}


def _submitted_text(data: Submitted) -> str:
    where = ", ".join(f"{count} on {name}" for name, count in data.backends.items())
    span = data.first if data.submitted == 1 else f"{data.first} to {data.last}"
    names = f" Named: {', '.join(f'{name} = {uid}' for name, uid in data.names.items())}." if data.names else ""
    return (
        f"Submitted {data.submitted}: {span} ({where}; {counts_text(data.counts)}).{names}\n"
        f'Next: wait_tasks(session="{data.session}").'
    )


def _matches(task: Task, state: State | None, name_part: str) -> bool:
    right_state = state is None or task.state.value == state or (state == "open" and not task.state.final)
    return right_state and name_part in (task.name or "")


def _page_text(page: TaskPage) -> str:
    lines = [f"{len(page.tasks)} of {page.total} tasks of {page.session}:", *(row.line() for row in page.tasks)]
    if page.next_cursor:
        lines.append(f'More: list_tasks with cursor="{page.next_cursor}".')
    return "\n".join(lines) if page.total else f"No task of {page.session} matches."


def _cancel_text(data: CancelReport) -> str:
    text = f"{data.canceled} canceled, {data.had_ended} had ended before."
    if data.still_ending:
        text += f" Still ending: {', '.join(data.still_ending)}; see wait_tasks."
    return text
