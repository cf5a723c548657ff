"""The tools that submit tasks, wait for them, list and cancel them, and show their results."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Resolve
from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.machine import inspect_machine
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, name_of
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.cancellation import (
    CancelReport,
    ask_to_cancel,
    cancel_report,
    tasks_to_cancel,
    with_dependents,
)
from rhapsody_mcp.toolsets.output.excerpts import OutputEnd
from rhapsody_mcp.toolsets.replies.base import Reply, TaskRows, fitted, reply, task_row
from rhapsody_mcp.toolsets.replies.formatting import call_text
from rhapsody_mcp.toolsets.replies.result_reply import TaskResult
from rhapsody_mcp.toolsets.replies.task_result import PageRequest, show_result
from rhapsody_mcp.toolsets.sessions import SessionId
from rhapsody_mcp.toolsets.submission.again import plan_again, run_again
from rhapsody_mcp.toolsets.submission.budget import ask_to_exceed
from rhapsody_mcp.toolsets.submission.plan import plan
from rhapsody_mcp.toolsets.submission.priorities import prioritize
from rhapsody_mcp.toolsets.submission.report import SubmissionReport
from rhapsody_mcp.toolsets.submission.submit import submit
from rhapsody_mcp.toolsets.tooling.background import to_thread_if_large
from rhapsody_mcp.toolsets.tooling.confirmation import Answer, CallContext, Force, require_agreement
from rhapsody_mcp.toolsets.tooling.deferred import LONGEST_WAIT_S, defer
from rhapsody_mcp.toolsets.waiting.patience import patience_of
from rhapsody_mcp.toolsets.waiting.report import WaitReport, wait_report
from rhapsody_mcp.toolsets.waiting.selection import State, select_tasks
from rhapsody_mcp.toolsets.waiting.until import Condition, UntilField
from rhapsody_mcp.toolsets.waiting.wait import ChangeSignal, tick_text, wait_for

__all__ = ["Tasks"]

_CANCEL_WAIT_S = 15.0
_SHARE_OF_CAP = 0.98
"""How much of the cap a wait takes at most: the reply has to be put together and its facts written down meanwhile."""


class TaskPage(Reply):
    session: str
    total: int
    tasks: TaskRows
    has_more: bool
    next_cursor: str | None = None


class Tasks:
    def __init__(self, sessions: SessionRegistry, settings: Settings) -> None:
        self._sessions, self._settings = sessions, settings
        self._signal = ChangeSignal()
        self.leave = sessions.watch(self._signal.notify)

    async def submit_tasks(
        self,
        session: SessionId,
        tasks: Annotated[list[TaskRequest] | None, Field(min_length=1, description="The tasks, in any order.")] = None,
        retry: Annotated[
            list[str] | None,
            Field(min_length=1, description="In place of tasks: run again, in place, what failed of these."),
        ] = None,
        reprioritize: Annotated[
            dict[str, int] | None,
            Field(min_length=1, description='Or: new priorities of tasks that wait, e.g. {"train": 5}.'),
        ] = None,
        dry_run: Annotated[bool, Field(description="true only shows the graph, and what does not fit.")] = False,
        idempotency_key: Annotated[
            str | None,
            Field(min_length=1, max_length=128, description="A repeated call with it submits nothing twice."),
        ] = None,
        force: Force = False,
        *,
        answer: Annotated[Answer, Resolve(ask_to_exceed)],
    ) -> Annotated[CallToolResult, SubmissionReport]:
        require_agreement(answer)
        open_session = self._sessions.get(session)
        if sum(given is not None for given in (tasks, retry, reprioritize)) != 1:
            raise InvalidRequest(
                "give one of tasks=[...] to submit, retry=[names] to run again what failed, and "
                "reprioritize={name: priority}."
            )
        if reprioritize is not None:
            return await prioritize(open_session, reprioritize)
        if tasks is None:
            names = list(dict.fromkeys(retry or ()))
            return plan_again(open_session, names) if dry_run else await run_again(open_session, names, idempotency_key)
        if dry_run:
            return await to_thread_if_large(plan, open_session, tasks, inspect_machine())
        return await submit(open_session, tasks, idempotency_key)

    async def wait_tasks(
        self,
        session: SessionId,
        context: CallContext,
        tasks: Annotated[
            list[str] | None,
            Field(description='Names or ids, e.g. ["train", "task.000007"]; default is every task of the session.'),
        ] = None,
        state: Annotated[State | None, Field(description='Only these; "open": all not ended.')] = None,
        count: Annotated[
            int | None,
            Field(ge=1, description="Return once so many more have ended (1: any); default is all."),
        ] = None,
        until: UntilField = None,
        cursor: Annotated[str | None, Field(description="Of the reply before.")] = None,
        timeout_s: Annotated[
            float | None,
            Field(ge=0, allow_inf_nan=False, description="Default 25, or what your client allows."),
        ] = None,
    ) -> Annotated[CallToolResult, WaitReport]:
        started = asyncio.get_running_loop().time()  # the cap is on the whole call, also on a long selection of tasks
        open_session = self._sessions.get(session)
        condition = Condition(open_session, until) if until is not None else None
        selected = select_tasks(open_session, tasks, state, cursor)
        waits = timeout_s != 0 and not all(task.state.final for task in selected.awaited)
        is_deferred = waits and defer()
        cap_s = LONGEST_WAIT_S if is_deferred else self._settings.wait_cap_s
        usual_s = min(self._settings.wait_default_s, cap_s)
        default_s = usual_s if is_deferred else selected.patience.default_s(usual_s)
        asked_s = default_s if timeout_s is None else timeout_s
        most_s = cap_s if is_deferred else min(cap_s, selected.patience.most_s(usual_s))
        applied_s = min(asked_s, most_s)

        async def tick(waited_s: float) -> None:
            await context.report_progress(waited_s, applied_s, tick_text(selected))

        until_s = min(applied_s, _SHARE_OF_CAP * cap_s)
        with selected.noting_end(is_deferred=is_deferred):
            waited_s, answer = await wait_for(
                selected,
                self._signal,
                count=count,
                timeout_s=until_s,
                started=started,
                tick=tick,
                condition=condition,
            )
        others = [one for one in self._sessions.all() if one is not open_session]
        return wait_report(
            selected,
            others,
            asked_timeout_s=asked_s,
            applied_timeout_s=applied_s,
            waited_s=waited_s,
            hint="" if is_deferred or timeout_s is not None else selected.patience.hint(usual_s),
            condition=condition,
            answer=answer,
        )

    async def list_tasks(
        self,
        session: SessionId,
        state: Annotated[State | None, Field(description='Only these; "open": all not ended.')] = None,
        name_contains: Annotated[str | None, Field(description='Only names with this in them, e.g. "sim-".')] = None,
        for_each: Annotated[str | None, Field(description="Only the tasks of this for_each, by its name.")] = None,
        slowest: Annotated[bool, Field(description="true: longest first, each task of a for_each by itself.")] = False,
        limit: Annotated[int, Field(ge=1, le=50, description="Most tasks in one reply.")] = 20,
        cursor: Annotated[str | None, Field(description="next_cursor of the reply before.")] = None,
    ) -> Annotated[CallToolResult, TaskPage]:
        open_session = self._sessions.get(session)
        tasks = open_session.session.tasks if for_each is None else _children_of(open_session.task(for_each))
        if slowest:
            tasks = sorted(leaves(tasks), key=lambda task: task.timing.execution_s or 0.0, reverse=True)
        start = 0 if cursor is None else _parse_cursor(cursor)
        if state is None and not name_contains:
            total, rest = len(tasks), list(enumerate(tasks[start : start + limit + 1], start + 1))
        else:
            matching = [(n, task) for n, task in enumerate(tasks, 1) if _matches(task, state, name_contains or "")]
            total, rest = len(matching), [(number, task) for number, task in matching if number > start]
        more = len(rest) > limit
        filters = {"state": state, "name_contains": name_contains, "for_each": for_each, "limit": limit}
        filters |= {"slowest": True} if slowest else {}

        def build(share: float) -> CallToolResult:
            page = TaskPage(
                session=session,
                total=total,
                tasks=[task_row(task, share, min(len(rest), limit)) for _, task in rest[:limit]],
                has_more=more,
                next_cursor=str(rest[limit - 1][0]) if more else None,
            )
            return reply(_page_text(page, filters), page)

        return fitted(build)

    async def get_result(
        self,
        session: SessionId,
        task: Annotated[str, Field(description='Its name or id, e.g. "train" or "task.000002".')],
        path: Annotated[str, Field(description='JSON Pointer to a part of the result, e.g. "/0/label".')] = "",
        rank: Annotated[int | None, Field(ge=0, description="One rank of a job, from 0.")] = None,
        start: Annotated[
            int | None, Field(description="Of the result: first item or character; -20: the last 20.")
        ] = None,
        limit: Annotated[int | None, Field(ge=1, description="Most items or characters; default: what fits.")] = None,
        output: Annotated[
            OutputEnd | None,
            Field(description='Show more of stdout and stderr: the end ("tail") or beginning ("head").'),
        ] = None,
        search: Annotated[
            str | None,
            Field(pattern=r"[^|\s]", max_length=200, description='Show their lines with a text, e.g. "error|warning".'),
        ] = None,
    ) -> Annotated[CallToolResult, TaskResult]:
        open_session = self._sessions.get(session)
        return await show_result(
            open_session.session,
            open_session.task(task),
            PageRequest(path, start, limit, self._settings.result_bytes),
            rank=rank,
            output=output,
            search=search,
        )

    async def cancel_tasks(
        self,
        session: SessionId,
        tasks: Annotated[list[str] | None, Field(min_length=1, description='Names or ids, e.g. ["sim-3"].')] = None,
        all_open: Annotated[bool, Field(description="Every task that has not ended.")] = False,
        force: Force = False,
        *,
        answer: Annotated[Answer, Resolve(ask_to_cancel)],
    ) -> Annotated[CallToolResult, CancelReport]:
        require_agreement(answer)
        open_session = self._sessions.get(session)
        canceled = tasks_to_cancel(open_session, tasks, all_open)
        had_ended = sum(task.state.final for task in leaves(canceled))
        if ending := with_dependents(canceled, open_session.session.tasks):
            defer()
        with anyio.move_on_after(patience_of(open_session).default_s(_CANCEL_WAIT_S)):
            await open_session.session.cancel([task for task in canceled if not task.state.final])
        return cancel_report(ending, had_ended)


def _children_of(task: Task) -> Sequence[Task]:
    if not isinstance(task, ForEach):
        raise InvalidRequest(f"{name_of(task)} is no for_each: it has no tasks of its own. Leave for_each out.")
    return task.children


def _parse_cursor(cursor: str) -> int:
    """The number of the last task that was shown. Numbers do not change, as tasks are only added."""
    if not is_index(cursor):
        raise InvalidRequest(
            f"cursor {cursor[:64]!r} is no next_cursor of a reply; leave cursor out for the first page."
        )
    return int(cursor)


def _matches(task: Task, state: State | None, name_part: str) -> bool:
    in_state = state is None or task.state.value == state or (state == "open" and not task.state.final)
    return in_state and name_part in (task.name or "")


def _page_text(page: TaskPage, filters: dict[str, Any]) -> str:
    rows = [row.line(previous) for previous, row in zip([None, *page.tasks], page.tasks, strict=False)]
    lines = [f"{len(page.tasks)} of {page.total} tasks of {page.session}:", *rows]
    if page.next_cursor:
        more = call_text("list_tasks", session=page.session, **filters, cursor=page.next_cursor)
        lines.append(f"More: {more}.")
    return "\n".join(lines) if page.total else f"No task of {page.session} matches."
