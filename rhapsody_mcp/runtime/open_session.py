"""An open session of a server: its tasks by name and uid, its functions and its recorder."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Collection, Sequence

from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.backend_factory import SessionConfig
from rhapsody_mcp.runtime.functions import FunctionRegistry, RegisteredFunction
from rhapsody_mcp.runtime.recovery.recorder import Recorder, Submission
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.session.acceptance import AcceptedTask
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import Task, child_named, split_item_name, with_children

__all__ = ["OpenSession"]


class OpenSession:
    """A session whose tasks are found by name or uid. Results stay encoded.

    A name belongs to the latest task that has it. A later task may take the name once that task has ended FAILED or
    CANCELED.
    """

    def __init__(self, id: str, session: Session, config: SessionConfig, recorder: Recorder | None = None) -> None:
        self.id, self.session, self.config = id, session, config
        self.functions = FunctionRegistry(session)
        self.recorder = recorder
        self.last_used = time.time()
        self._tasks: dict[str, Task] = {}
        self._named: dict[str, Task] = {}
        self.submissions: dict[str, Submission] = {}
        """The submissions that have an idempotency key, by this key."""
        self.naming_lock = asyncio.Lock()
        """Held from the choice of uids and names until `submit` returns."""

    def new_uids(self, count: int) -> list[str]:
        """The next uids. Only a submission that succeeds uses them up."""
        taken = len(self._tasks)
        return [f"task.{taken + number:06d}" for number in range(1, count + 1)]

    def task(self, name: str) -> Task:
        """The task with this name or uid, or the child of a for_each, for example `sweep[3]`.

        Raises UnknownName, which lists the valid names.
        """
        if (task := self._named.get(name) or self._tasks.get(name) or self._child(name)) is None:
            raise UnknownName("task", name, self._named or self._tasks)
        return task

    def by_uid(self, uid: str) -> Task:
        """The task with this uid, also where another task has this uid as its name. Raises UnknownName."""
        if (task := self.find(uid)) is None:
            raise UnknownName("task", uid, self._tasks)
        return task

    def find(self, uid: str) -> Task | None:
        """As `by_uid`; None where there is no such task."""
        return self._tasks.get(uid) or self._child(uid)

    def _child(self, name: str) -> Task | None:
        parent_name, number = split_item_name(name)
        parent = self._named.get(parent_name) or self._tasks.get(parent_name)
        return None if parent is None or number is None else child_named(parent, name)

    def tasks(self, names: Collection[str]) -> list[Task]:
        return [self.task(name) for name in dict.fromkeys(names)]

    def name_holder(self, name: str) -> Task | None:
        """The latest task that has this name."""
        return self._named.get(name)

    def has_name(self, name: str) -> bool:
        """Whether a task that did not end FAILED or CANCELED has this name."""
        task = self._named.get(name)
        return task is not None and task.state not in (TaskState.FAILED, TaskState.CANCELED)

    @property
    def cwd(self) -> str:
        """The working directory of the tasks."""
        return self.config.folder or os.getcwd()

    @property
    def durability_warning(self) -> str:
        """A sentence about why outcomes may not survive a crash now; empty where they do."""
        return self.recorder.durability_warning if self.recorder is not None else ""

    async def submit(
        self,
        tasks: Sequence[Task],
        accepted: list[AcceptedTask],
        stored_requests: Sequence[bytes] = (),
        submission: Submission | None = None,
    ) -> None:
        """Submit tasks that the session has accepted. With a ledger, their stored requests are durable first.

        Raises SessionClosed or LedgerUnavailable, with no task submitted.
        """
        now = time.time()
        for task in with_children(tasks):
            task.submitted = now
        if self.recorder is not None:
            await self.recorder.record_submission(tasks, stored_requests, submission)
        await self.session.submit_accepted(tasks, accepted)
        if submission is not None:
            self.submissions[submission.key] = submission
        self.add_tasks(tasks)

    async def retry(self, tasks: Sequence[Task], key: str, digest: bytes) -> list[Task]:
        """As `Session.retry`; with a ledger, that they run again is durable first. `key` is empty for a call without an
        idempotency key. Raises LedgerUnavailable, with nothing changed."""
        submission: Submission | None = None

        async def record(again: Sequence[Task]) -> None:
            nonlocal submission
            submission = Submission(key, digest, tuple(again)) if key else None
            if self.recorder is not None:
                await self.recorder.record_retry(again, submission)

        again = await self.session.retry(tasks, record)
        if submission is not None:
            self.submissions[key] = submission
        return again

    async def prioritize(self, priorities: Sequence[tuple[Task, int]]) -> None:
        """Give each of these tasks its priority, where it has not ended; with a ledger, the priorities are durable
        first. Of a for_each, a single task has its new priority only in the life of this service."""
        if self.recorder is not None:
            by_priority: defaultdict[int, list[Task]] = defaultdict(list)
            for task, priority in priorities:
                by_priority[priority] += [task] if task.parent is None and not task.state.final else []
            for priority, tasks in by_priority.items():
                if tasks:
                    await self.recorder.record_priority(tasks, priority)
        for task, priority in priorities:
            if not task.state.final:
                self.session.prioritize(task, priority)

    def add_uid(self, task: Task) -> None:
        """Make the task known by its uid alone."""
        self._tasks[task.uid] = task

    def add_tasks(self, tasks: Sequence[Task]) -> None:
        """Make the tasks known by uid and name."""
        for task in tasks:
            if task.name and (earlier := self._named.get(task.name)):
                self.session.replace(earlier, task.uid)
            self._tasks[task.uid] = task
            if task.name:
                self._named[task.name] = task

    async def register(self, source: Source, name: str | None, timeout_s: float) -> RegisteredFunction:
        """Register a function. Raises what `FunctionRegistry.check` raises, and LedgerUnavailable."""
        function = await self.functions.check(source, name, timeout_s)
        if self.recorder is not None:
            await self.recorder.record_function(function)
        self.functions.add(function)
        return function
