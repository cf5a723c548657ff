"""Writes what happens to a session's tasks into the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import (
    Change,
    DropEngine,
    EngineRow,
    FunctionRow,
    PutEngine,
    PutFunction,
    PutSubmission,
    PutTasks,
    SubmissionRow,
    TaskEnded,
    TaskRequeued,
    TaskRow,
    TaskStarted,
)
from rhapsody_mcp.model.errors import LedgerError, LedgerUnavailable
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.call_context import current_caller
from rhapsody_mcp.runtime.functions import Registered
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task

__all__ = ["Engines", "Recorder", "Submission"]

_AGAIN_S = 0.5
_MADE_AT_ONCE = 500


class Submission(NamedTuple):
    """A call that gave an idempotency key: a digest of what it asked for, and what it made."""

    key: str
    asked: bytes
    tasks: tuple[Task, ...]


class Recorder:
    """Of one session. What is submitted is durable before it is done; what comes of it, soon after."""

    def __init__(self, ledger: Ledger, key: str, session: Session) -> None:
        """`key` is the name of the session in the ledger."""
        self.key, self.engines = key, Engines(ledger, key)
        self.skipped = 0
        """How many places in the order of ends nothing is known of: ends that were never written."""
        self._ledger, self._session = ledger, session
        self._made: list[TaskRow] = []
        """The tasks of for_each that are new and not given to the ledger yet."""

    @property
    def trouble(self) -> str:
        """Why what ends now could be lost, in a sentence; empty where it could not."""
        why = self._ledger.problem
        return why and f"the service cannot write down what becomes of tasks, and would lose it if it ended now: {why}"

    async def submit(self, tasks: Sequence[Task], recipes: Sequence[bytes], submission: Submission | None) -> None:
        """Raises LedgerUnavailable, with nothing written."""
        taken = self._session.size
        numbered = zip(tasks, recipes, strict=True)
        rows = tuple(self._row(task, number, recipe) for number, (task, recipe) in enumerate(numbered, taken))
        await self._ledger.commit(PutTasks(rows), *([self._submission(submission)] if submission else ()))

    async def register(self, function: Registered) -> None:
        """Raises LedgerUnavailable, with nothing written."""
        source = function.source
        row = FunctionRow(
            session=self.key,
            number=function.number,
            name=function.name,
            source=source.text,
            entry=source.entry,
            signature=function.signature,
            docstring=function.docstring,
        )
        await self._ledger.commit(PutFunction(row))

    async def starting(self, uids: Sequence[str]) -> bool:
        """True when all that is known of these, and how often they were started before, is durable: whether one has
        started since, the notes beside its result tell. False where the session was closed first. While nothing can be
        written nothing starts; with a damaged ledger, which no next life will read, everything does."""
        while not self._session.closed:
            try:
                self._write_made()
                await self._ledger.commit()
                return not self._session.closed
            except LedgerUnavailable:
                await asyncio.sleep(_AGAIN_S)
            except LedgerError:
                return True
        return False

    def changed(self, task: Task) -> None:
        """After each change of a task's state."""
        match task.state:
            case TaskState.WAITING if task.parent is not None:
                self._make(self._row(task, self._session.size, b""))
            case TaskState.QUEUED if task.attempts:
                self.write(TaskRequeued(self.key, task.uid, task.attempts, task.last_failure))
            case TaskState.RUNNING if task.started is not None and not isinstance(task, ForEach):
                self.write(TaskStarted(self.key, task.uid, task.started, task.attempts))
            case state if state.final and task.outcome is not None:
                self.write(TaskEnded(self.key, task.uid, len(self._session.ended) - 1 + self.skipped, task.outcome))

    def suspended(self, task: Task) -> None:
        """In the place of `changed` while everything is ended for a next life, which tasks that have not come to an end
        of their own begin anew, or find lost."""
        if task.state in (TaskState.DONE, TaskState.FAILED) and task.cause is not Cause.LOST:
            self.changed(task)

    def write(self, change: Change) -> None:
        """Soon."""
        self._write_made()
        self._ledger.write(change)

    def _make(self, row: TaskRow) -> None:
        if not self._made:
            asyncio.get_running_loop().call_soon(self._write_made)
        self._made.append(row)
        if len(self._made) == _MADE_AT_ONCE:
            self._write_made()

    def _write_made(self) -> None:
        if self._made:
            made, self._made = tuple(self._made), []
            self._ledger.write(PutTasks(made))

    def _row(self, task: Task, number: int, recipe: bytes) -> TaskRow:
        return TaskRow(
            session=self.key,
            uid=task.uid,
            number=number,
            parent=task.parent.uid if task.parent else None,
            recipe=recipe,
            state=TaskState.WAITING,
            submitted=task.submitted or 0.0,
            started=None,
            attempts=0,
            retries=task.retries,
            last_failure="",
            position=None,
            outcome=None,
            client=current_caller.get(),
        )

    def _submission(self, submission: Submission) -> PutSubmission:
        uids = tuple(task.uid for task in submission.tasks)
        at = min((task.submitted for task in submission.tasks if task.submitted), default=0.0)
        row = SubmissionRow(
            session=self.key,
            key=submission.key,
            asked=submission.asked,
            uids=uids,
            at=at,
            client=current_caller.get(),
        )
        return PutSubmission(row)


class Engines:
    """The EngineBook of a session's backends."""

    def __init__(self, ledger: Ledger, key: str) -> None:
        self._ledger, self._key = ledger, key
        self._rows: dict[str, EngineRow] = {}

    async def opened(self, mark: str, kind: str, folder: str) -> None:
        row = self._rows[mark] = EngineRow(mark, kind, self._key, 0, 0, folder)
        await self._ledger.commit(PutEngine(row))

    def launched(self, mark: str, pid: int, started: int) -> None:
        self._ledger.write(PutEngine(replace(self._rows[mark], pid=pid, started=started)))

    def closed(self, mark: str) -> None:
        self._ledger.write(DropEngine(mark))
        self._rows.pop(mark, None)
