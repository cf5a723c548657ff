"""Records the tasks of a session and their changes in the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
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
    ReopenTasks,
    SetPriority,
    SubmissionRow,
    TaskEnded,
    TaskRequeued,
    TaskRow,
    TaskStarted,
)
from rhapsody_mcp.model.errors import LedgerError, LedgerUnavailable
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.call_context import current_caller
from rhapsody_mcp.runtime.functions import RegisteredFunction
from rhapsody_mcp.runtime.session.again import attempts_before
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task

__all__ = ["LedgerEngineBook", "Recorder", "Storage", "Submission"]

_RETRY_S, _FLUSH_S = 0.5, 10.0
_CHILDREN_PER_WRITE = 500


class Storage(NamedTuple):
    """Where a service stores its sessions: the ledger, and the folder of long results."""

    ledger: Ledger
    folder: Path


class Submission(NamedTuple):
    """A call of submit_tasks with an idempotency key: the digest of its requests, and its tasks."""

    key: str
    request_digest: bytes
    tasks: tuple[Task, ...]


class Recorder:
    """Records one session. A submission is durable before its tasks run; their changes are durable soon after."""

    def __init__(self, ledger: Ledger, key: str, session: Session) -> None:
        """`key` identifies the session in the ledger."""
        self.key, self.engine_book = key, LedgerEngineBook(ledger, key)
        self.skipped = 0
        """How many positions in the order of ends have no record, because these ends were never written."""
        self._ledger, self._session = ledger, session
        self._new_children: list[TaskRow] = []
        """The children of for_each tasks that are not in the ledger yet."""

    @property
    def durability_warning(self) -> str:
        """A sentence about why outcomes may not survive a crash now; empty where they do."""
        problem = self._ledger.problem
        if not problem:
            return ""
        return f"the service cannot write down what becomes of tasks, and would lose it if it ended now: {problem}"

    async def record_submission(
        self, tasks: Sequence[Task], stored_requests: Sequence[bytes], submission: Submission | None
    ) -> None:
        """Make a submission durable. Raises LedgerUnavailable, with nothing written."""
        first_number = self._session.task_count
        numbered = zip(tasks, stored_requests, strict=True)
        rows = tuple(
            self._row(task, number, stored_request)
            for number, (task, stored_request) in enumerate(numbered, first_number)
        )
        await self._ledger.commit(PutTasks(rows), *([self._submission(submission)] if submission else ()))

    async def record_retry(self, tasks: Sequence[Task], submission: Submission | None) -> None:
        """Make durable that these tasks run again. Raises LedgerUnavailable, with nothing written."""
        if not await self._ledger.flush(_FLUSH_S):  # an end that waits for its files would come after this
            raise LedgerUnavailable(self._ledger.problem or "the ledger is not written in time; try again.")
        retries = {task.uid: attempts_before(task) + task.retries for task in tasks}
        change = ReopenTasks(self.key, time.time(), retries)
        await self._ledger.commit(change, *([self._submission(submission)] if submission else ()))

    async def record_priority(self, tasks: Sequence[Task], priority: int) -> None:
        """Make the priority of submitted tasks durable. Raises LedgerUnavailable, with nothing written."""
        await self._ledger.commit(SetPriority(self.key, tuple(task.uid for task in tasks), priority))

    async def record_function(self, function: RegisteredFunction) -> None:
        """Make a registered function durable. Raises LedgerUnavailable, with nothing written."""
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

    async def before_start(self, uids: Sequence[str]) -> bool:
        """The `BeforeStart` of the session's backends: True when everything recorded about these tasks is durable.

        After a restart, the notes beside a result say whether a task has started since. Waits while the ledger cannot
        be written. False where the session is closed first. True with a damaged ledger, which no restart will read.
        """
        while not self._session.closed:
            try:
                self._write_new_children()
                await self._ledger.commit()
                return not self._session.closed
            except LedgerUnavailable:
                await asyncio.sleep(_RETRY_S)
            except LedgerError:
                return True
        return False

    def record_change(self, task: Task) -> None:
        """Record a change of a task's state."""
        match task.state:
            case TaskState.WAITING if task.parent is not None:
                self._add_child(self._row(task, self._session.task_count, b""))
            case TaskState.QUEUED if task.attempts:
                self.write(TaskRequeued(self.key, task.uid, task.attempts, task.last_failure))
            case TaskState.RUNNING if task.started is not None and not isinstance(task, ForEach):
                self.write(TaskStarted(self.key, task.uid, task.started, task.attempts))
            case state if state.final and task.outcome is not None:
                self.write(TaskEnded(self.key, task.uid, len(self._session.ended) - 1 + self.skipped, task.outcome))

    def record_while_suspending(self, task: Task) -> None:
        """Record only ends that the shutdown of the service did not cause; replaces `record_change` during a shutdown.

        After the restart, other tasks run again or end with cause lost.
        """
        if task.state in (TaskState.DONE, TaskState.FAILED) and task.cause is not Cause.LOST:
            self.record_change(task)

    def write(self, change: Change) -> None:
        """Queue a change for the ledger, after the new children; does not wait for the disk."""
        self._write_new_children()
        self._ledger.write(change)

    def _add_child(self, row: TaskRow) -> None:
        if not self._new_children:
            asyncio.get_running_loop().call_soon(self._write_new_children)
        self._new_children.append(row)
        if len(self._new_children) == _CHILDREN_PER_WRITE:
            self._write_new_children()

    def _write_new_children(self) -> None:
        if self._new_children:
            rows, self._new_children = tuple(self._new_children), []
            self._ledger.write(PutTasks(rows))

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
            retries=task.most_attempts - 1,
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
            asked=submission.request_digest,
            uids=uids,
            at=at,
            client=current_caller.get(),
        )
        return PutSubmission(row)


class LedgerEngineBook:
    """The EngineBook of a session's backends: records engines in the ledger."""

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
