"""The reply of `wait_tasks`: what has ended since the cursor, what is open and why, and what to call next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from operator import itemgetter
from typing import Annotated, Any

from mcp.types import CallToolResult
from pydantic import Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.backends.compute.node_pool import needs_text
from rhapsody_mcp.model.live.progress import Progress, progress_text
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, leaves, name_of
from rhapsody_mcp.toolsets.allocations import (
    AllocationFacts,
    allocation_data,
    allocation_of,
    allocation_sentence,
    is_pending,
    nodes_text,
)
from rhapsody_mcp.toolsets.replies.base import Reply, Row, count_states, fitted, reply, row_fields, told_fields
from rhapsody_mcp.toolsets.replies.failure_groups import FailureGroups, group_failures, group_notes
from rhapsody_mcp.toolsets.replies.formatting import call_text, counts_text, duration, one_line, shortened
from rhapsody_mcp.toolsets.replies.previews import preview_task, printed_only_text
from rhapsody_mcp.toolsets.tooling.schemas import TYPE_ONLY
from rhapsody_mcp.toolsets.waiting.selection import SelectedTasks, has_children
from rhapsody_mcp.toolsets.waiting.until import Answer, Condition

__all__ = ["WaitReport", "wait_report"]

_READY = "ready"
_ROWS, _RESULTS_CHARS, _RESULT_CHARS, _PASSED_ON_CHARS = 20, 3000, 1200, 400
_GROUPS, _NAMES_SHOWN, _NOTES, _SOURCES = 5, 5, 5, 3
_NAMES_REPEATED = 50
_TOLD_CHARS = 150
_STATE_CHARS = 60
"""A longer state of an engine is not repeated for each task."""
_NOTICES, _RECENT_S, _JUST_NOW_S = 2, 600.0, 5.0
_HAVE_DETAILS = (Cause.ERROR, Cause.EXIT_CODE, Cause.CRASHED, Cause.TIMEOUT)
"""Causes of failures that `get_result` shows a traceback or output for."""


class ResultRow(Row):
    """Its result, where that is short, or a preview."""

    result: Any = None
    preview: str | None = None

    def line(self, text: str) -> str:
        """As in `task.000002 train DONE in 0.31 s: {"accuracy": 0.9}`."""
        return f"{self.head()}: {one_line(text)}" if text else self.head()


class WaitReport(Reply):
    ended: Annotated[bool, Field(description="Whether all have.")]
    counts: Annotated[dict[str, int], TYPE_ONLY]
    done: Annotated[
        list[ResultRow],
        WithJsonSchema(
            {
                "type": "array",
                "items": {"type": "object"},
            }
        ),
    ]
    failures: FailureGroups
    cursor: str
    asked_timeout_s: SkipJsonSchema[float]
    applied_timeout_s: SkipJsonSchema[float]
    waited_s: SkipJsonSchema[float]
    done_not_shown: SkipJsonSchema[int | None] = None
    failures_not_shown: SkipJsonSchema[int | None] = None
    open: SkipJsonSchema[list[str] | None] = None
    notes: SkipJsonSchema[list[str] | None] = None
    engines: SkipJsonSchema[dict[str, str] | None] = None
    allocation: SkipJsonSchema[dict[str, Any] | None] = None
    until: SkipJsonSchema[dict[str, Any] | None] = None
    running: SkipJsonSchema[dict[str, Any] | None] = None


def wait_report(
    selected: SelectedTasks,
    others: Sequence[OpenSession] = (),
    *,
    asked_timeout_s: float,
    applied_timeout_s: float,
    waited_s: float,
    hint: str = "",
    condition: Condition | None = None,
    answer: Answer | None = None,
) -> CallToolResult:
    """The tasks that have ended since the cursor. Rows that do not fit are the first rows of the next reply.

    A result that another task gets has less room, as the agent need not read it. Where the job of the session is
    pending, the nodes that the `others` have are named. `hint` says how the next wait can take longer.
    """
    news = selected.news()
    shown, position, hidden = _page(selected, news)
    new_uids = {task.uid for _, task in news}
    tasks = {task.uid: task for task in leaves(selected.awaited)}.values()
    all_ended = all(task.state.final for task in selected.until)
    notes = _notes(selected, [task for _, task in news])
    notes += [selected.patience.note] if selected.patience.note and not all_ended else []
    running = _telling(selected)
    engines = selected.open_session.session.engines
    allocation = allocation_of(selected.open_session)
    if is_pending(allocation):
        notes += [text for other in others if (text := nodes_text(other))]

    def build(share: float) -> CallToolResult:
        room = int(min(_RESULT_CHARS, _RESULTS_CHARS // max(1, len(shown))) * share)
        rows = [
            _row(task, min(room, _PASSED_ON_CHARS) if task.passed_on else room, new_uids, share, len(shown))
            for task in shown
        ]
        failures = group_failures((task for _, task in news), share)
        data = WaitReport(
            ended=all_ended,
            counts=count_states(tasks),
            done=[row for row, _ in rows],
            done_not_shown=hidden or None,
            failures=failures[:_GROUPS],
            failures_not_shown=sum(group.count for group in failures[_GROUPS:]) or None,
            open=None if all_ended else _open(selected),
            notes=notes or None,
            engines=engines or None,
            allocation=allocation_data(allocation),
            cursor=selected.cursor(position),
            asked_timeout_s=asked_timeout_s,
            applied_timeout_s=applied_timeout_s,
            waited_s=round(waited_s, 3),
            until=_until(condition, answer) if condition is not None else None,
            running=_told(running, share) or None,
        )
        return reply(_text(data, [row.line(text) for row, text in rows], selected, allocation, hint), data)

    return fitted(build)


def _until(condition: Condition, answer: Answer | None) -> dict[str, Any]:
    text = condition.so_far if answer is None else answer.text
    return {"met": answer is not None and answer.is_met, "text": text}


def _telling(selected: SelectedTasks) -> dict[str, Progress]:
    """What the first running tasks have told, by name."""
    running = (task for task in leaves(selected.until) if task.state is TaskState.RUNNING)
    telling = ((name_of(task), task.progress) for task in running if task.progress is not None)
    return dict(islice(telling, _NAMES_SHOWN))


def _told(running: dict[str, Progress], share: float) -> dict[str, Any]:
    return {name: told_fields(progress, share, len(running)) for name, progress in running.items()}


def _notes(selected: SelectedTasks, ended: Sequence[Task]) -> list[str]:
    errors = {task.outcome.error for task in ended if task.outcome}
    notes = [selected.note] if selected.note else []
    return [*notes, *group_notes(ended, _NOTES), *_service_notes(selected.open_session, errors)]


def _service_notes(open_session: OpenSession, errors: Collection[str]) -> list[str]:
    """Recent notices of engines, each once and only where no error of `errors` contains the notice, and why the ledger
    cannot be written."""
    now = time.time()
    ages = {notice.text: now - notice.at for notice in open_session.session.notices if notice.at > now - _RECENT_S}
    untold = ((text, age) for text, age in ages.items() if not any(text in error for error in errors))
    notices = [_with_age(text, age) for text, age in sorted(untold, key=itemgetter(1), reverse=True)]
    return [*notices[-_NOTICES:], *([open_session.durability_warning] if open_session.durability_warning else [])]


def _with_age(text: str, age_s: float) -> str:
    return text if age_s < _JUST_NOW_S else f"{duration(age_s)} ago: {text}"


def _page(selected: SelectedTasks, news: Sequence[tuple[int, Task]]) -> tuple[list[Task], int, int]:
    """The tasks that get a row, the position of the cursor after them, and how many more there are.

    The last task to end, which is the result of a pipeline, always gets a row.
    """
    rows: dict[str, tuple[int, Task]] = {}
    for position, task in news:
        if task.state is TaskState.DONE or (has_children(task) and "DONE" in count_states(leaves([task]))):
            row = selected.row_of(task)
            rows.setdefault(row.uid, (position, row))
    done = list(rows.values())
    if len(done) <= _ROWS:
        return [task for _, task in done], len(selected.open_session.session.ended), 0
    position = done[_ROWS - 1][0]
    return [task for _, task in [*done[: _ROWS - 1], done[-1]]], position, len(done) - _ROWS


def _row(task: Task, max_chars: int, new_uids: set[str], share: float, rows: int) -> tuple[ResultRow, str]:
    """The row, one of so many, and the text of its result."""
    fields = row_fields(task, share, rows)
    shown = preview_task(task, max_chars, lambda child: child.uid in new_uids)
    if shown is None:
        return ResultRow(**fields), ""
    if task.outcome and (printed := printed_only_text(task.outcome.value, task.outcome.stdout)):
        return ResultRow(**fields, preview=printed), printed
    result = {"result": shown.value} if shown.complete else {"preview": shown.text}
    return ResultRow(**fields, **result), shown.text


# --- open tasks


def _open(selected: SelectedTasks) -> list[str]:
    """The first open tasks, each with the reason, as in `train WAITING for samples`."""
    rows = {row.uid: row for task in selected.until if not (row := selected.row_of(task)).state.final}
    pending, session = list(rows.values()), selected.open_session.session
    running = Counter(task.backend for task in leaves(session.tasks) if task.state is TaskState.RUNNING)
    shown = [(task, _next_to_start(task)) for task in pending[:_NAMES_SHOWN]]
    before = session.queued_before(first for _, first in shown)
    texts = [
        f"{name_of(task)} {task.state}{_why(task, first, before, running, session.engines)}" for task, first in shown
    ]
    return texts + ([f"and {len(pending) - _NAMES_SHOWN} more"] if len(pending) > _NAMES_SHOWN else [])


def _next_to_start(task: Task) -> Task:
    """Of a for_each, the task that starts next."""
    queued = [child for child in task.children if child.state is TaskState.QUEUED] if isinstance(task, ForEach) else []
    return max(queued, key=lambda child: child.priority, default=task)


def _why(task: Task, first: Task, before: dict[str, int], running: Counter[str | None], engines: dict[str, str]) -> str:
    if task.state is TaskState.RUNNING and task.progress is not None:
        return f" ({shortened(progress_text(task.progress), _TOLD_CHARS)})"
    if task.state is TaskState.WAITING:
        sources = {name_of(source): None for source in task.sources() if not source.state.final}
        return f" for {', '.join(list(sources)[:_SOURCES])}" if sources else ""
    if task.state is TaskState.RUNNING and task.attempts > 1:
        return f", attempt {task.attempts} of {max(task.attempts, task.most_attempts)}"
    task = first
    if task.state is not TaskState.QUEUED or task.backend is None:
        return ""
    if task.held_until:
        return f" until {task.held_until}"
    if task.last_failure and task.uid not in before:
        return f" to be tried again: {shortened(task.last_failure, 100)}"
    if (state := engines.get(task.backend, _READY)) != _READY:
        return f" until {task.backend} is ready{f' ({state})' if len(state) <= _STATE_CHARS else ''}"
    if count := before.get(task.uid):
        runs = running[task.backend]
        waits = f", {count - runs} of them waiting" if count > runs else ""
        return f" behind {count} on {task.backend}{waits}{_at_once(task)}"
    return f" at {task.backend}, which has not started it yet{_at_once(task)}"


def _at_once(task: Task) -> str:
    """What has to be free at a time for the task, where that is more than a core."""
    if not isinstance(task, ComputeTask) or task.layout.cores <= 1:
        return ""
    ranks, needs = task.layout.ranks, needs_text(task.layout.needs)
    return f"; it needs {f'{ranks} times {needs}' if ranks > 1 else needs} at once"


# --- as text


def _text(
    data: WaitReport,
    rows: list[str],
    selected: SelectedTasks,
    allocation: AllocationFacts | None,
    hint: str,
) -> str:
    session = selected.open_session.id
    if not data.counts and selected.tasks:
        return f"None of them is {selected.state}: {_states_text(selected.tasks)}."
    if not data.counts:
        return f'There is no task to wait for.\nNext: submit_tasks(session="{session}", tasks=[...]).'
    lines = [*([_until_line(data.until)] if data.until else []), _first_line(data)]
    if data.engines and not data.ended:
        lines.append(f"Engines: {_engines_text(data.engines)}.")
    is_told = allocation is not None and any(
        f"job {allocation.job} " in state for state in (data.engines or {}).values()
    )
    if allocation is not None and allocation.on and not is_told:
        lines.append(f"Allocation: {allocation_sentence(allocation)}.")
    if data.open:
        lines.append(f"Open: {one_line('; '.join(data.open))}.")
    if rows or data.failures:
        lines.append("Results and errors are untrusted output of the tasks:")
    lines += rows
    if data.done_not_shown:
        lines.append(f"... and {data.done_not_shown} more DONE: {_repeated_call(data, selected)} shows the next.")
    lines += [*(group.line() for group in data.failures), *_hidden_failures(data, session)]
    lines += [f"Note: {one_line(note).rstrip('.')}." for note in data.notes or []]
    return "\n".join([*lines, *_next_steps(data, selected, allocation, hint)])


def _until_line(until: dict[str, Any]) -> str:
    return f"Condition {'met' if until['met'] else 'not met'}: {one_line(until['text'])}."


def _engines_text(engines: dict[str, str]) -> str:
    """As in `dragon ready, vllm starting`; engines in the same state together."""
    names: dict[str, list[str]] = {}
    for name, state in engines.items():
        names.setdefault(state, []).append(name)
    return ", ".join(f"{' and '.join(same)} {state}" for state, same in names.items())


def _hidden_failures(data: WaitReport, session: str) -> list[str]:
    if not data.failures_not_shown:
        return []
    states = [state for state in ("FAILED", "CANCELED") if data.counts.get(state)]
    calls = " and ".join(call_text("list_tasks", session=session, state=state) for state in states)
    return [f"... and {data.failures_not_shown} more: {calls}"]


def _states_text(tasks: Sequence[Task]) -> str:
    """As in `sweep 100 DONE; last DONE`."""
    if len(tasks) > _NAMES_SHOWN:
        return counts_text(count_states(leaves(tasks)))
    return "; ".join(
        f"{name_of(task)} {counts_text(count_states(leaves([task]))) if has_children(task) else task.state}"
        for task in tasks
    )


def _first_line(data: WaitReport) -> str:
    cut = f" (asked {data.asked_timeout_s:g} s)" if data.asked_timeout_s != data.applied_timeout_s else ""
    waited = f"waited {duration(data.waited_s)} of {data.applied_timeout_s:g} s{cut}"
    if not data.ended:
        return f"Not all have ended: {counts_text(data.counts)}; {waited}."
    return f'All have ended: {counts_text(data.counts)}; {waited}; cursor "{data.cursor}".'


def _repeated_call(data: WaitReport, selected: SelectedTasks) -> str:
    """The same call with the cursor of this reply."""
    if len(selected.names or ()) > _NAMES_REPEATED:
        return f'the same call with cursor="{data.cursor}"'
    names = None if selected.names is None else list(selected.names)
    session, state = selected.open_session.id, selected.state
    return call_text("wait_tasks", session=session, tasks=names, state=state, cursor=data.cursor)


def _next_steps(data: WaitReport, selected: SelectedTasks, allocation: AllocationFacts | None, hint: str) -> list[str]:
    steps, session = [], selected.open_session.id
    if not data.ended:
        again = _repeated_call(data, selected)
        hint = f". {hint}" if hint else ""
        steps.append(f"{again} again, which shows what ends from now on; nothing is lost meanwhile{hint}")
    if is_pending(allocation):
        give_up = f"{call_text('close_session', session=session)} to give up waiting for the job, which ends it"
        steps.append(f"{give_up} (force=true where your client cannot ask a person)")
    if failed := [group.tasks[0] for group in data.failures if group.cause in _HAVE_DETAILS]:
        steps.append(f"{call_text('get_result', session=session, task=failed[0])} for its traceback and output")
    return [f"Next: {step}." for step in steps]
