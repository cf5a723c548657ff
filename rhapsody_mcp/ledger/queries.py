"""Queries of a ledger: functions of the store that join the rows of several tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import msgspec

from rhapsody_mcp.engine.process.kept_output import KeptOutput, kept_outputs
from rhapsody_mcp.engine.task.output import printed_by_ranks, with_printed
from rhapsody_mcp.engine.task.start_log import read_starts
from rhapsody_mcp.ledger.records import (
    Change,
    DropSession,
    EngineRow,
    FunctionRow,
    HandleRow,
    SessionRow,
    SubmissionRow,
    TaskEnded,
    TaskRequeued,
    TaskRow,
)
from rhapsody_mcp.ledger.store import Store
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState

__all__ = [
    *("START", "Cursor", "engines", "functions", "handles", "interrupted_tasks", "number", "prune", "sessions"),
    *("submissions", "tasks"),
]

Cursor: TypeAlias = tuple[int, int]
"""The number and the rowid of the last task of a page."""
START: Cursor = (-1, -1)
_PAGE_ROWS = 1000
_SESSIONS = "SELECT id, created, used, wanted, client, folder, closing FROM sessions"


def sessions(store: Store) -> list[SessionRow]:
    return _sessions(store.read(f"{_SESSIONS} ORDER BY created, rowid"))


def _sessions(rows: list[tuple[Any, ...]]) -> list[SessionRow]:
    return [
        SessionRow(id, created, used, wanted, client, folder, bool(closing))
        for id, created, used, wanted, client, folder, closing in rows
    ]


def tasks(session: str, cursor: Cursor) -> Callable[[Store], tuple[list[TaskRow], Cursor | None]]:
    """A page of tasks and the cursor of the next page, or None. Writes can run between the pages of a long read."""

    def read(store: Store) -> tuple[list[TaskRow], Cursor | None]:
        rows = store.read(_TASKS, session, *cursor, _PAGE_ROWS)
        page = [_task(session, *fields) for _, *fields in rows]
        return page, (page[-1].number, int(rows[-1][0])) if len(rows) == _PAGE_ROWS else None

    return read


_TASKS = """
    SELECT t.rowid, t.uid, t.number, t.parent, t.recipe,
        CASE WHEN e.uid IS NOT NULL THEN e.state WHEN s.started IS NOT NULL THEN 'RUNNING'
            WHEN s.uid IS NOT NULL THEN 'QUEUED' ELSE t.state END,
        t.submitted, s.started, coalesce(s.attempts, 0), t.retries, coalesce(s.last_failure, ''),
        e.position, e.outcome, t.client
    FROM tasks t LEFT JOIN starts s USING (session, uid) LEFT JOIN ends e USING (session, uid)
    WHERE t.session = ? AND (t.number, t.rowid) > (?, ?) ORDER BY t.number, t.rowid LIMIT ?
"""


def _task(
    session: str, uid: str, number: int, parent: str | None, recipe: bytes, state: str, submitted: float,
    started: float | None, attempts: int, retries: int, last_failure: str, position: int | None,
    outcome: bytes | None, client: str,
) -> TaskRow:  # fmt: skip
    return TaskRow(
        session=session,
        uid=uid,
        number=number,
        parent=parent,
        recipe=recipe,
        state=TaskState(state),
        submitted=submitted,
        started=started,
        attempts=attempts,
        retries=retries,
        last_failure=last_failure,
        position=position,
        outcome=None if outcome is None else _outcome(outcome, state, submitted),
        client=client,
    )


def _outcome(data: bytes, state: str, submitted: float) -> Outcome:
    try:
        return _OUTCOMES.decode(data)
    except msgspec.MsgspecError as error:
        message = f"this task ended {state}, but what came of it cannot be read from the ledger ({error})."
        return Outcome(state=TaskState.FAILED, ended=submitted, cause=Cause.LOST, error=message)


_OUTCOMES = msgspec.msgpack.Decoder(Outcome)


def functions(session: str) -> Callable[[Store], list[FunctionRow]]:
    sql = "SELECT * FROM functions WHERE session = ? ORDER BY number"
    return lambda store: [FunctionRow(*fields) for fields in store.read(sql, session)]


def submissions(session: str) -> Callable[[Store], list[SubmissionRow]]:
    sql = "SELECT * FROM submissions WHERE session = ? ORDER BY rowid"
    return lambda store: [_submission(*fields) for fields in store.read(sql, session)]


def _submission(session: str, key: str, asked: bytes, uids: str, at: float, client: str) -> SubmissionRow:
    return SubmissionRow(session, key, asked, tuple(msgspec.json.decode(uids, type=list[str])), at, client)


def handles(store: Store) -> list[HandleRow]:
    return [HandleRow(*fields) for fields in store.read("SELECT * FROM handles ORDER BY rowid")]


def engines(store: Store) -> list[EngineRow]:
    return [EngineRow(*fields) for fields in store.read("SELECT * FROM engines ORDER BY rowid")]


def number(name: str) -> Callable[[Store], int]:
    sql = "SELECT coalesce(max(value), 0) FROM numbers WHERE name = ?"
    return lambda store: int(store.read(sql, name)[0][0])


def interrupted_tasks(now: float, kept: Collection[str] = ()) -> Callable[[Store], list[Change]]:
    """The changes that settle the tasks that ran, or may have run, at the last write. The start logs in the sessions'
    folders tell of starts that the ledger misses."""

    def read(store: Store) -> list[Change]:
        ends: dict[str, int] = {}
        folders = [folder for (folder,) in store.read("SELECT folder FROM sessions")]
        starts = {folder: read_starts(folder) for folder in folders}
        printed = {folder: _Printed(folder, kept_outputs(folder)) for folder in folders}
        last_signs = _last_signs_of_life(store, now)
        changes = (
            _settle(ends, last_signs[session], starts.get(folder, ()), printed.get(folder), session, *fields)
            for folder, session, *fields in store.read(_OPEN_TASKS)
            if session not in kept
        )
        return [change for change in changes if change is not None]

    return read


_OPEN_TASKS = """
    WITH parents AS (SELECT DISTINCT session, parent FROM tasks WHERE parent IS NOT NULL),
        last AS (SELECT session, max(position) AS position FROM ends GROUP BY session)
    SELECT sessions.folder, t.session, t.uid, s.started, coalesce(s.attempts, 0), coalesce(s.last_failure, ''),
        t.retries, coalesce(last.position + 1, 0)
    FROM tasks t LEFT JOIN starts s USING (session, uid) LEFT JOIN sessions ON sessions.id = t.session
        LEFT JOIN last USING (session)
    WHERE (t.session, t.uid) NOT IN parents
        AND NOT EXISTS (SELECT 1 FROM ends e WHERE e.session = t.session AND e.uid = t.uid)
    ORDER BY t.session, t.number, t.rowid
"""


def _last_signs_of_life(store: Store, now: float) -> dict[str, float]:
    """The latest time at which each session was known to live: of a submission, a start, an end or a use."""
    return {
        session: min(now, max(used, _outcome(outcome, state, 0.0).ended if outcome else 0.0))
        for session, used, state, outcome in store.read(_LAST_SIGNS)
    }


_LAST_SIGNS = """
    WITH lives AS (SELECT session, max(submitted) AS submitted FROM tasks GROUP BY session),
        begun AS (SELECT session, max(started) AS started FROM starts GROUP BY session),
        last AS (SELECT session, max(position), state, outcome FROM ends GROUP BY session)
    SELECT lives.session, max(coalesce(sessions.used, 0), lives.submitted, coalesce(begun.started, 0)),
        last.state, last.outcome
    FROM lives LEFT JOIN sessions ON sessions.id = lives.session LEFT JOIN begun USING (session)
        LEFT JOIN last USING (session)
"""
_LOST_TEXT = "the service ended while this task was running, and what it did until then is not known"


class _Printed(NamedTuple):
    """What tasks had printed that ran as the service ended, and the folder of their session's results."""

    folder: str
    outputs: Mapping[tuple[str, int], KeptOutput]

    def added_to(self, outcome: Outcome, start: tuple[str, int]) -> Outcome:
        kept = self.outputs.get(start)
        if kept is None:
            return outcome
        return with_printed(outcome, printed_by_ranks(start[0], kept.paths, self.folder, kept.limit))


def _settle(
    ends: dict[str, int], last_sign: float, starts: Collection[tuple[str, int]], printed: _Printed | None, session: str,
    uid: str, started: float | None, attempts: int, last_failure: str, retries: int, first: int,
) -> Change | None:  # fmt: skip
    """None for a task that was not sent to a backend. `ends` counts the new ends of each session."""
    attempt = attempts + 1 if started is None else attempts
    if not started and (uid, attempt) not in starts:
        return None if started is None else TaskRequeued(session, uid, attempts - 1, last_failure)
    if attempt <= retries:
        return TaskRequeued(session, uid, attempt, f"{_LOST_TEXT}.")
    position = ends.setdefault(session, first)
    ends[session] += 1
    message = f"{_LOST_TEXT}. Submit it again, with retries if it may be run twice."
    ended = max(last_sign, started or last_sign)
    outcome = Outcome(state=TaskState.FAILED, ended=ended, started=started or None, cause=Cause.LOST, error=message)
    return TaskEnded(session, uid, position, printed.added_to(outcome, (uid, attempt)) if printed else outcome)


def prune(before: float) -> Callable[[Store], list[SessionRow]]:
    """Delete and return the sessions that were last used before this time and whose tasks have all ended."""
    sql = f"""{_SESSIONS} WHERE used < ? AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.session = id
        AND NOT EXISTS (SELECT 1 FROM ends e WHERE e.session = t.session AND e.uid = t.uid)) ORDER BY created, rowid"""

    def delete(store: Store) -> list[SessionRow]:
        unused = _sessions(store.read(sql, before))
        store.begin(DropSession(row.id) for row in unused)
        store.commit()
        return unused

    return delete
