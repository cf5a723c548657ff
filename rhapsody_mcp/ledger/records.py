"""The rows of a ledger, and the changes to them with their SQL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import msgspec

from rhapsody_mcp.ledger.sql import ENDS, STARTS, TASKS, Field, Statement
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.states import TaskState

__all__ = [
    *("Change", "CloseSession", "DropEngine", "DropHandles", "DropSession", "EngineRow", "FunctionRow", "HandleRow"),
    *("PutEngine", "PutFunction", "PutHandle", "PutNumber", "PutSession", "PutSubmission", "PutTasks", "ReopenTasks"),
    *("SessionRow", "SetPriority"),
    *("SubmissionRow", "TaskEnded", "TaskRequeued", "TaskRow", "TaskStarted", "UseSession"),
]


_UIDS_PER_STATEMENT = 500


class SessionRow(msgspec.Struct, frozen=True):
    """A session. `created` and `used` (the last use) are seconds since the epoch; `wanted` is the request as JSON."""

    id: str
    created: float
    used: float
    wanted: bytes
    client: str
    folder: str
    closing: bool


class TaskRow(msgspec.Struct, frozen=True):
    """A task. `number` counts submissions in the session, `position` counts ends. `recipe` is the stored request, empty
    for a task that its parent's request makes. Times are seconds since the epoch."""

    session: str
    uid: str
    number: int
    parent: str | None
    recipe: bytes
    state: TaskState
    submitted: float
    started: float | None
    attempts: int
    retries: int
    last_failure: str
    position: int | None
    outcome: Outcome | None
    client: str


class FunctionRow(msgspec.Struct, frozen=True):
    """A registered function; `number` counts the registrations in the session."""

    session: str
    number: int
    name: str
    source: str
    entry: str
    signature: str
    docstring: str


class SubmissionRow(msgspec.Struct, frozen=True):
    """A call with an idempotency key: its request (`asked`) and the uids of its tasks."""

    session: str
    key: str
    asked: bytes
    uids: tuple[str, ...]
    at: float
    client: str


class HandleRow(msgspec.Struct, frozen=True):
    """The handle of a deferred call, as JSON, until it expires (seconds since the epoch)."""

    task_id: str
    data: bytes
    expires: float


class EngineRow(msgspec.Struct, frozen=True):
    """An engine process. `started` is field 22 of /proc/PID/stat; `pid` and `started` are 0 before the start."""

    mark: str
    kind: str
    session: str
    pid: int
    started: int
    folder: str


class Change(msgspec.Struct, frozen=True):
    """A change of rows."""

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        """The statements, with their values."""
        raise NotImplementedError

    def files(self) -> Iterable[str]:
        """Files that must be on the disk before the change is written."""
        return ()


class PutSession(Change, frozen=True):
    """Writes a new or changed session."""

    row: SessionRow
    SQL: ClassVar = Statement("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, msgspec.structs.astuple(self.row)


class UseSession(Change, frozen=True):
    """Notes a use of a session. The latest time counts, also after the clock was set back."""

    id: str
    used: float
    SQL: ClassVar = Statement("UPDATE sessions SET used = max(used, ?) WHERE id = ?")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, (self.used, self.id)


class CloseSession(Change, frozen=True):
    """Marks a session as closing, so that it is not restored."""

    id: str
    SQL: ClassVar = Statement("UPDATE sessions SET closing = 1 WHERE id = ?")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, (self.id,)


class DropSession(Change, frozen=True):
    """Deletes a session with all its rows; later changes of its tasks are ignored."""

    id: str
    SQL: ClassVar = (
        Statement("DELETE FROM sessions WHERE id = ?"),
        *(
            Statement(f"DELETE FROM {table} WHERE session = ?")
            for table in ("tasks", "starts", "ends", "functions", "submissions")
        ),
    )

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield from ((statement, (self.id,)) for statement in self.SQL)


class PutTasks(Change, frozen=True):
    """Writes new tasks. A task that exists is replaced, but keeps its end."""

    tasks: tuple[TaskRow, ...]

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        for row in self.tasks:
            fields = (row.session, row.uid, row.number, row.parent, row.recipe, row.state.value)
            yield TASKS, (*fields, row.submitted, row.retries, row.client)
            if row.attempts or row.started is not None or row.last_failure:
                yield STARTS, (row.session, row.uid, row.started, row.attempts, row.last_failure)
            if row.outcome is not None:
                yield from TaskEnded(row.session, row.uid, row.position or 0, row.outcome).rows()

    def files(self) -> Iterable[str]:
        return [file for row in self.tasks if row.outcome is not None for file in _files(row.outcome)]


class TaskStarted(Change, frozen=True):
    """User code runs since `started`; 0, which earlier versions wrote, says that it may run. `attempts` includes this
    start."""

    session: str
    uid: str
    started: float
    attempts: int

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield STARTS, (self.session, self.uid, self.started, self.attempts, None)


class TaskRequeued(Change, frozen=True):
    """The task waits for its next start."""

    session: str
    uid: str
    attempts: int
    last_failure: str

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield STARTS, (self.session, self.uid, None, self.attempts, self.last_failure)


class ReopenTasks(Change, frozen=True):
    """These tasks run again: their ends are deleted. By uid, `retries` is how many further attempts each may have after
    its first one ever."""

    session: str
    submitted: float
    retries: dict[str, int]

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        by_retries: dict[int, list[str]] = {}
        for uid, retries in self.retries.items():
            by_retries.setdefault(retries, []).append(uid)
        for retries, uids in by_retries.items():
            yield from _of_tasks(
                "UPDATE tasks SET submitted = ?, retries = ?", (self.submitted, retries), self.session, uids
            )
        yield from _of_tasks("UPDATE starts SET started = NULL", (), self.session, list(self.retries))
        yield from _of_tasks("DELETE FROM ends", (), self.session, list(self.retries))


class SetPriority(Change, frozen=True):
    """Changes the priority in the stored requests of these tasks; those of a for_each have none of their own."""

    session: str
    uids: tuple[str, ...]
    priority: int

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield from _of_tasks(
            "UPDATE tasks SET recipe = CAST(json_set(CAST(recipe AS TEXT), '$.request.priority', ?) AS BLOB)",
            (self.priority,),
            self.session,
            list(self.uids),
        )


class TaskEnded(Change, frozen=True):
    """The task's outcome. A second outcome is ignored."""

    session: str
    uid: str
    position: int
    outcome: Outcome

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        state, outcome = self.outcome.state.value, msgspec.msgpack.encode(self.outcome)
        yield ENDS, (self.session, self.uid, self.position, state, outcome)

    def files(self) -> Iterable[str]:
        return _files(self.outcome)


def _of_tasks(
    sql: str, fields: tuple[Field, ...], session: str, uids: list[str]
) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
    """The statement for these tasks, for many in a few rows."""
    for first in range(0, len(uids), _UIDS_PER_STATEMENT):
        some = uids[first : first + _UIDS_PER_STATEMENT]
        places = ", ".join("?" * len(some))
        yield Statement(f"{sql} WHERE session = ? AND uid IN ({places})"), (*fields, session, *some)


class PutFunction(Change, frozen=True):
    """Writes a registered function."""

    row: FunctionRow
    SQL: ClassVar = Statement("INSERT OR REPLACE INTO functions VALUES (?, ?, ?, ?, ?, ?, ?)")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, msgspec.structs.astuple(self.row)


class PutSubmission(Change, frozen=True):
    """Writes a call with an idempotency key."""

    row: SubmissionRow
    SQL: ClassVar = Statement("INSERT OR REPLACE INTO submissions VALUES (?, ?, ?, ?, ?, ?)")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        row = self.row
        uids = msgspec.json.encode(row.uids).decode()
        yield self.SQL, (row.session, row.key, row.asked, uids, row.at, row.client)


class PutHandle(Change, frozen=True):
    """Writes a handle."""

    row: HandleRow
    SQL: ClassVar = Statement("INSERT OR REPLACE INTO handles VALUES (?, ?, ?)")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, msgspec.structs.astuple(self.row)


class DropHandles(Change, frozen=True):
    """Deletes the handles that expired before this time."""

    before: float
    SQL: ClassVar = Statement("DELETE FROM handles WHERE expires < ?")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, (self.before,)


class PutEngine(Change, frozen=True):
    """Writes an engine, before its start and after it."""

    row: EngineRow
    SQL: ClassVar = Statement("INSERT OR REPLACE INTO engines VALUES (?, ?, ?, ?, ?, ?)")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, msgspec.structs.astuple(self.row)


class DropEngine(Change, frozen=True):
    """Deletes an engine whose processes have all ended."""

    mark: str
    SQL: ClassVar = Statement("DELETE FROM engines WHERE mark = ?")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, (self.mark,)


class PutNumber(Change, frozen=True):
    """Sets a counter."""

    name: str
    value: int
    SQL: ClassVar = Statement("INSERT OR REPLACE INTO numbers VALUES (?, ?)")

    def rows(self) -> Iterator[tuple[Statement, tuple[Field, ...]]]:
        yield self.SQL, (self.name, self.value)


def _files(outcome: Outcome) -> list[str]:
    parts: tuple[Outcome | RankOutcome, ...] = (outcome, *outcome.ranks)
    streams = [stream.file for part in parts for stream in (part.stdout, part.stderr) if stream.file is not None]
    return [*streams, *(path for part in parts if part.value is not None for path in part.value.paths)]
