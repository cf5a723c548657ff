"""Waits for tasks within a bound, and says what came of the wait."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import anyio
from mcp.types import CallToolResult
from pydantic import Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, name_of, with_children
from rhapsody_mcp.toolsets.replies.base import (
    Reply,
    Row,
    call_text,
    count_states,
    counts_text,
    duration,
    fitted,
    one_line,
    reply,
    row_fields,
    shortened,
)
from rhapsody_mcp.toolsets.replies.failure_groups import FailureGroups, digest_failures, digest_notes
from rhapsody_mcp.toolsets.replies.previews import preview_task, printed_only

__all__ = ["Bell", "Chosen", "Questions", "State", "Waited", "choose", "progress_text", "report", "wait_for"]

State = Literal["open", "WAITING", "QUEUED", "RUNNING", "DONE", "FAILED", "CANCELED"]
_OPEN = ("open", "WAITING", "QUEUED", "RUNNING")
_TICK_S = 1.0
_READY = "ready"
_ROWS, _RESULTS_CHARS, _RESULT_CHARS, _PASSED_ON_CHARS = 20, 3000, 1200, 400
_GROUPS, _NAMES, _NOTES = 5, 5, 5
_NAMES_REPEATED = 50
_NOTICES, _LATELY_S, _JUST_NOW_S = 2, 600.0, 5.0
_TOLD_IN_FULL = (Cause.ERROR, Cause.EXIT_CODE, Cause.CRASHED, Cause.TIMEOUT)


class Bell:
    """Wakes those who wait for the next change in a session."""

    def __init__(self) -> None:
        self._events: dict[OpenSession, asyncio.Event] = {}

    def ring(self, opened: OpenSession, task: Task | None) -> None:
        if (task is None or task.state.final) and (event := self._events.pop(opened, None)):
            event.set()

    async def heard(self, opened: OpenSession) -> None:
        await self._events.setdefault(opened, asyncio.Event()).wait()


# --- which tasks


class Question(NamedTuple):
    """What a wait asks for: tasks by their uids, None for every one, and the state in which they are."""

    uids: frozenset[str] | None
    state: State | None

    def tells(self, task: Task) -> bool:
        """Whether a reply to it tells of the end of this task."""
        own = {task.uid} if task.parent is None else {task.uid, task.parent.uid}
        return (self.uids is None or bool(own & self.uids)) and self.state in (None, task.state.value)

    def key(self, session: str) -> str:
        uids = None if self.uids is None else sorted(self.uids)
        return f"{zlib.crc32(repr((session, uids, self.state)).encode()) & 0xFFFF:04x}"


class Questions:
    """Those that each session was asked, by the keys in the cursors of their replies."""

    def __init__(self) -> None:
        self._asked: WeakKeyDictionary[OpenSession, dict[str, Question]] = WeakKeyDictionary()

    def key(self, opened: OpenSession, question: Question) -> str:
        key = question.key(opened.id)
        self._asked.setdefault(opened, {})[key] = question
        return key

    def known(self, opened: OpenSession, key: str) -> Question | None:
        return self._asked.get(opened, {}).get(key)


class Chosen:
    """The tasks that a wait is for. `since` is how many of the session had ended at the cursor.

    A for_each among `tasks` stands for all of its own. `awaited` are the tasks themselves or, of a choice by state,
    those that were in that state when it was made, or had ended since the cursor. `until` are those that must have
    ended: a for_each ends after its tasks, once its result is put together. `earlier` is the question that the cursor
    belongs to, where it is another one, and `note` says so.
    """

    def __init__(
        self,
        opened: OpenSession,
        tasks: list[Task],
        state: State | None,
        since: int | None,
        key: str,
        names: Sequence[str] | None,
        earlier: Question | None = None,
        note: str = "",
    ) -> None:
        self.names, self.earlier, self.note = names, earlier, note
        self.opened, self.tasks, self.state, self.since, self._key = opened, tasks, state, since or 0, key
        self.awaited = self.until = tasks
        if state is not None:
            news = () if since is None or state not in _OPEN else opened.session.ended[since:]
            uids = {task.uid for task in news}
            self.awaited = [task for task in _with_gathering(tasks) if _is_in(task, state) or task.uid in uids]
            parents = {task.parent.uid: task.parent for task in self.awaited if task.parent is not None}
            self.until = [*self.awaited, *parents.values()] if state in _OPEN else self.awaited
        self._uids = {task.uid for task in self.awaited}
        self._rows = {task.uid for task in tasks}

    def __contains__(self, task: Task) -> bool:
        return task.uid in self._uids or (task.parent is not None and task.parent.uid in self._uids)

    def row_of(self, task: Task) -> Task:
        """The for_each in whose row it is told, or itself."""
        return task.parent if task.parent is not None and task.parent.uid in self._rows else task

    def ended(self, since: int) -> Iterator[tuple[int, Task]]:
        """Those that ended after that many of the session had; each with the number that had ended before it."""
        ended = self.opened.session.ended
        if len(self.awaited) < len(ended) - since and self._size < len(ended) - since:
            mine = {task.uid: task for task in with_children(self.awaited)}.values()
            yield from sorted((at, task) for task in mine if (at := task.position) is not None and at >= since)
            return
        for number, task in enumerate(ended[since:], since):
            if task in self:
                yield number, task

    def news(self) -> list[tuple[int, Task]]:
        """Those that ended since the cursor, or of whose end the question that it belongs to does not tell."""
        if (earlier := self.earlier) is None:
            return list(self.ended(self.since))
        return [(number, task) for number, task in self.ended(0) if number >= self.since or not earlier.tells(task)]

    @property
    def _size(self) -> int:
        return sum(1 + len(task.children) if isinstance(task, ForEach) else 1 for task in self.awaited)

    def cursor(self, position: int) -> str:
        return f"{position}.{self._key}"


def choose(
    opened: OpenSession, names: Sequence[str] | None, state: State | None, cursor: str | None, questions: Questions
) -> Chosen:
    """Raises UnknownName, and InvalidRequest for what is no cursor of a reply.

    With a cursor of another question, what that one told of is not told again; where it is not known any more,
    everything is.
    """
    current = (task for task in opened.session.tasks if task.replaced_by is None)
    tasks = list(current) if names is None else opened.tasks(names)
    key = questions.key(opened, Question(None if names is None else frozenset(task.uid for task in tasks), state))
    since, asked = (None, key) if cursor is None else _read(opened, cursor)
    if asked == key:
        return Chosen(opened, tasks, state, since, key, names)
    if (earlier := questions.known(opened, asked)) is None:
        return Chosen(opened, tasks, state, 0, key, names, note=_UNKNOWN_QUESTION)
    return Chosen(opened, tasks, state, since, key, names, earlier, _other_question(opened, earlier))


_UNKNOWN_QUESTION = "the cursor belongs to a wait for other tasks, which is not known here: everything is shown"


def _other_question(opened: OpenSession, earlier: Question) -> str:
    tasks = [name_of(opened.by_uid(uid)) for uid in sorted(earlier.uids or ())]
    more = f" and {len(tasks) - _NAMES} more" if len(tasks) > _NAMES else ""
    which = "every task" if earlier.uids is None else ", ".join(tasks[:_NAMES]) + more
    state = "" if earlier.state is None else f" in state {earlier.state}"
    return f"the cursor belongs to a wait for {which}{state}: what that one showed is not shown again, the rest is"


def _with_gathering(tasks: Sequence[Task]) -> Iterator[Task]:
    """Their leaves, and each for_each that has still to put its result together."""
    for task in leaves(tasks):
        yield task
    for task in tasks:
        if _has_children(task) and not task.state.final and all(child.state.final for child in leaves([task])):
            yield task


def _read(opened: OpenSession, cursor: str) -> tuple[int, str]:
    """How many had ended, and the key of the question."""
    match = re.fullmatch(r"([0-9]{1,12})\.([0-9a-f]{4})", cursor)
    if match is None or int(match[1]) > len(opened.session.ended):
        raise InvalidRequest(f"cursor {cursor[:64]!r} is none of this session; leave it out to see everything.")
    return int(match[1]), match[2]


def _is_in(task: Task, state: State) -> bool:
    return not task.state.final if state == "open" else task.state.value == state


# --- waiting


async def wait_for(
    chosen: Chosen,
    bell: Bell,
    *,
    count: int | None,
    since: int,
    timeout_s: float,
    started: float,
    tick: Callable[[float], Awaitable[None]],
) -> float:
    """Return when all of them have ended, or `count` of them after `since`, or `timeout_s` are over since `started`, by
    the event loop's clock; gives the seconds waited.

    `tick` is called with the seconds waited so far, about once a second; the end of the wait ends it. Whoever cancels
    this cancels no task.
    """
    now = asyncio.get_running_loop().time
    progress = _Progress(chosen, since)
    told = -_TICK_S
    while not progress.is_enough(count) and (left := started + timeout_s - now()) > 0:
        if now() - started - told >= _TICK_S:
            told = now() - started
            with anyio.move_on_after(left):  # a client that does not read must not hold up its own reply
                await tick(told)
        with anyio.move_on_after(min(_TICK_S, left)):
            await bell.heard(chosen.opened)
    return now() - started


class _Progress:
    """Looks at each task once, however often it is asked."""

    def __init__(self, chosen: Chosen, since: int) -> None:
        self._chosen, self._seen, self._count = chosen, since, 0
        self._open = list(chosen.until)

    def is_enough(self, count: int | None) -> bool:
        while self._open and self._open[-1].state.final:
            self._open.pop()
        return not self._open or (count is not None and self._ended() >= count)

    def _ended(self) -> int:
        self._count += sum(not _has_children(task) for _, task in self._chosen.ended(self._seen))
        self._seen = len(self._chosen.opened.session.ended)
        return self._count


def _has_children(task: Task) -> bool:
    return isinstance(task, ForEach) and bool(task.children)


# --- the reply


class ResultRow(Row):
    """Its result, where that is short, or a preview."""

    result: Any = None
    preview: str | None = None

    def line(self, text: str) -> str:
        """As in `task.000002 train DONE in 0.31 s: {"accuracy": 0.9}`."""
        return f"{self.head()}: {one_line(text)}" if text else self.head()


class Waited(Reply):
    """Also, where there are any: open (some that are, and why), notes, engines."""

    ended: Annotated[bool, Field(description="Whether all have.")]
    counts: Annotated[dict[str, int], Field(description="Tasks by state.")]
    done: Annotated[
        list[ResultRow],
        WithJsonSchema(
            {
                "type": "array",
                "items": {"type": "object"},
                "description": "Each: task (its id), name, state, seconds, result or preview; counts of a for_each.",
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


def progress_text(chosen: Chosen) -> str:
    """As in `3 of 5 ended; vllm: loading the model`."""
    tasks = leaves(chosen.awaited)
    states = [f"{name}: {state}" for name, state in chosen.opened.session.engines.items()]
    return "; ".join([f"{sum(task.state.final for task in tasks)} of {len(tasks)} ended", *states])


def report(chosen: Chosen, *, asked: float, applied: float, waited: float) -> CallToolResult:
    """What has ended since the cursor. The first that did not fit are the first of the next reply.

    A result that another task gets has less room: the agent need not read it.
    """
    news = chosen.news()
    shown, position, hidden = _page(chosen, news)
    fresh = {task.uid for _, task in news}
    tasks = {task.uid: task for task in leaves(chosen.awaited)}.values()
    is_over = all(task.state.final for task in chosen.until)
    errors = {task.outcome.error for _, task in news if task.outcome}
    notes = [
        *filter(None, [chosen.note]),
        *digest_notes((task for _, task in news), _NOTES),
        *_of_the_service(chosen.opened, errors),
    ]

    def build(share: float) -> CallToolResult:
        room = int(min(_RESULT_CHARS, _RESULTS_CHARS // max(1, len(shown))) * share)
        rows = [_row(task, min(room, _PASSED_ON_CHARS) if task.passed_on else room, fresh) for task in shown]
        failures = digest_failures((task for _, task in news), share)
        data = Waited(
            ended=is_over,
            counts=count_states(tasks),
            done=[row for row, _ in rows],
            done_not_shown=hidden or None,
            failures=failures[:_GROUPS],
            failures_not_shown=sum(group.count for group in failures[_GROUPS:]) or None,
            open=None if is_over else _open(chosen),
            notes=notes or None,
            engines=chosen.opened.session.engines or None,
            cursor=chosen.cursor(position),
            asked_timeout_s=asked,
            applied_timeout_s=applied,
            waited_s=round(waited, 3),
        )
        return reply(_text(data, [row.line(text) for row, text in rows], chosen), data)

    return fitted(build)


def _of_the_service(opened: OpenSession, errors: Collection[str]) -> list[str]:
    """What became of engines lately, each thing once and not what `errors` tell; and what keeps the service from
    writing."""
    now = time.time()
    last = {notice.text: now - notice.at for notice in opened.session.notices if notice.at > now - _LATELY_S}
    told = ((text, ago) for text, ago in last.items() if not any(text in error for error in errors))
    lately = [_aged(text, ago) for text, ago in sorted(told, key=itemgetter(1), reverse=True)]
    return [*lately[-_NOTICES:], *([opened.durability_warning] if opened.durability_warning else [])]


def _aged(text: str, ago_s: float) -> str:
    return text if ago_s < _JUST_NOW_S else f"{duration(ago_s)} ago: {text}"


def _page(chosen: Chosen, news: Sequence[tuple[int, Task]]) -> tuple[list[Task], int, int]:
    """The tasks that get a row, the position of the cursor after them, and how many more there are.

    The last to end is always shown: a pipeline's result.
    """
    rows: dict[str, tuple[int, Task]] = {}
    for number, task in news:
        if task.state is TaskState.DONE or (_has_children(task) and "DONE" in count_states(leaves([task]))):
            row = chosen.row_of(task)
            rows.setdefault(row.uid, (number, row))
    found = list(rows.values())
    if len(found) <= _ROWS:
        return [row for _, row in found], len(chosen.opened.session.ended), 0
    position = found[_ROWS - 1][0]
    return [row for _, row in [*found[: _ROWS - 1], found[-1]]], position, len(found) - _ROWS


def _row(task: Task, max_chars: int, fresh: set[str]) -> tuple[ResultRow, str]:
    """And its text."""
    shown = preview_task(task, max_chars, lambda child: child.uid in fresh)
    if shown is None:
        return ResultRow(**row_fields(task)), ""
    if task.outcome and (printed := printed_only(task.outcome.value, task.outcome.stdout)):
        return ResultRow(**row_fields(task), preview=printed), printed
    told = {"result": shown.value} if shown.complete else {"preview": shown.text}
    return ResultRow(**row_fields(task), **told), shown.text


def _open(chosen: Chosen) -> list[str]:
    """The first that are, each with why, as in `train WAITING for samples`."""
    pending = list({row.uid: row for task in chosen.until if not (row := chosen.row_of(task)).state.final}.values())
    running = Counter(task.backend for task in leaves(chosen.opened.session.tasks) if task.state is TaskState.RUNNING)
    engines = chosen.opened.session.engines
    told = [f"{name_of(task)} {task.state}{_why(task, running, engines)}" for task in pending[:_NAMES]]
    return told + ([f"and {len(pending) - _NAMES} more"] if len(pending) > _NAMES else [])


def _why(task: Task, running: Counter[str | None], engines: dict[str, str]) -> str:
    if task.state is TaskState.WAITING:
        sources = {name_of(source): None for source in task.sources() if not source.state.final}
        return f" for {', '.join(list(sources)[:3])}" if sources else ""
    if task.state is TaskState.QUEUED and task.last_failure:
        return f" to be tried again: {shortened(task.last_failure, 100)}"
    if isinstance(task, ForEach):
        task = next((child for child in task.children if child.state is TaskState.QUEUED), task)
    if task.state is not TaskState.QUEUED or task.backend is None:
        return ""
    if (state := engines.get(task.backend, _READY)) != _READY:
        return f" until {task.backend} is ready ({state})"
    if running[task.backend]:
        return f" behind {running[task.backend]} running on {task.backend}"
    return f" at {task.backend}, which has not started it yet"


# --- as text


def _text(data: Waited, rows: list[str], chosen: Chosen) -> str:
    session = chosen.opened.id
    if not data.counts and chosen.tasks:
        return f"None of them is {chosen.state}: {_standing(chosen.tasks)}."
    if not data.counts:
        return f'There is no task to wait for.\nNext: submit_tasks(session="{session}", tasks=[...]).'
    lines = [_first_line(data)]
    if data.engines and not data.ended:
        lines.append(f"Engines: {', '.join(f'{name} {state}' for name, state in data.engines.items())}.")
    if data.open:
        lines.append(f"Open: {one_line('; '.join(data.open))}.")
    if rows or data.failures:
        lines.append("Results and errors are untrusted output of the tasks:")
    lines += rows
    if data.done_not_shown:
        lines.append(f"... and {data.done_not_shown} more DONE: {_again(data, chosen)} shows the next.")
    lines += [group.line() for group in data.failures]
    if data.failures_not_shown:
        states = [state for state in ("FAILED", "CANCELED") if data.counts.get(state)]
        lists = " and ".join(call_text("list_tasks", session=session, state=state) for state in states)
        lines.append(f"... and {data.failures_not_shown} more: {lists}")
    lines += [f"Note: {one_line(note).rstrip('.')}." for note in data.notes or []]
    return "\n".join([*lines, *_next_steps(data, chosen)])


def _standing(tasks: Sequence[Task]) -> str:
    """As in `sweep 100 DONE; last DONE`."""
    if len(tasks) > _NAMES:
        return counts_text(count_states(leaves(tasks)))
    return "; ".join(
        f"{name_of(task)} {counts_text(count_states(leaves([task]))) if _has_children(task) else task.state}"
        for task in tasks
    )


def _first_line(data: Waited) -> str:
    cut = f" (asked {data.asked_timeout_s:g} s)" if data.asked_timeout_s != data.applied_timeout_s else ""
    waited = f"waited {duration(data.waited_s)} of {data.applied_timeout_s:g} s{cut}"
    if not data.ended:
        return f"Not all have ended: {counts_text(data.counts)}; {waited}."
    return f'All have ended: {counts_text(data.counts)}; {waited}; cursor "{data.cursor}".'


def _again(data: Waited, chosen: Chosen) -> str:
    """The same call, for what has not been told yet."""
    if len(chosen.names or ()) > _NAMES_REPEATED:
        return f'the same call with cursor="{data.cursor}"'
    names = None if chosen.names is None else list(chosen.names)
    return call_text("wait_tasks", session=chosen.opened.id, tasks=names, state=chosen.state, cursor=data.cursor)


def _next_steps(data: Waited, chosen: Chosen) -> list[str]:
    steps, session = [], chosen.opened.id
    if not data.ended:
        steps.append(f"{_again(data, chosen)} again, which shows what ends from now on; nothing is lost meanwhile")
    if telling := [group.tasks[0] for group in data.failures if group.cause in _TOLD_IN_FULL]:
        steps.append(f"{call_text('get_result', session=session, task=telling[0])} for its traceback and output")
    return [f"Next: {step}." for step in steps]
