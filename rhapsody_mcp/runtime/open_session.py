"""An open session of a server: its tasks by name and id, its functions, and what is written down of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Sequence

from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.backend_factory import SessionConfig
from rhapsody_mcp.runtime.functions import FunctionRegistry, RegisteredFunction
from rhapsody_mcp.runtime.recovery.recorder import Recorder, Submission
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.session.acceptance import AcceptedTask
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task, with_children

__all__ = ["OpenSession"]


class OpenSession:
    """A session whose tasks are spoken of by name or uid; results stay encoded in it.

    A name belongs to the last task that took it; it is free again once that task ended FAILED or CANCELED.
    """

    def __init__(self, id: str, session: Session, config: SessionConfig, recorder: Recorder | None = None) -> None:
        self.id, self.session, self.config = id, session, config
        self.functions = FunctionRegistry(session)
        self.recorder = recorder
        self.last_used = time.time()
        self._tasks: dict[str, Task] = {}
        self._named: dict[str, Task] = {}
        self.submissions: dict[str, Submission] = {}
        """By idempotency key."""
        self.submission_lock = asyncio.Lock()
        """Held from the choice of uids and names until `submit` has returned."""

    def new_uids(self, count: int) -> list[str]:
        """The next uids; they are taken only by a submission that is."""
        taken = len(self._tasks)
        return [f"task.{taken + number:06d}" for number in range(1, count + 1)]

    def task(self, name: str) -> Task:
        """Also one of a for_each, as in `sweep[3]`. Raises UnknownName, which knows the names that there are."""
        if (task := self._named.get(name) or self._tasks.get(name) or self._child(name)) is None:
            raise UnknownName("task", name, self._named or self._tasks)
        return task

    def by_uid(self, uid: str) -> Task:
        """Whatever has this uid for its name. Raises UnknownName."""
        if (task := self._tasks.get(uid) or self._child(uid)) is None:
            raise UnknownName("task", uid, self._tasks)
        return task

    def _child(self, name: str) -> Task | None:
        parent_name, _, number = name.removesuffix("]").rpartition("[")
        parent = self._named.get(parent_name) or self._tasks.get(parent_name)
        if parent is None or not is_index(number):
            return None
        children = parent.children if isinstance(parent, ForEach) else []
        if int(number) < len(children):
            return children[int(number)]
        valid = (
            f"{parent_name}[0] to {parent_name}[{len(children) - 1}]"
            if children
            else f"{parent_name}, which has no tasks of its own"
        )
        raise UnknownName("task", name, (), valid)

    def tasks(self, names: Collection[str]) -> list[Task]:
        return [self.task(name) for name in dict.fromkeys(names)]

    def task_named(self, name: str) -> Task | None:
        """The task that has this name."""
        return self._named.get(name)

    def has_name(self, name: str) -> bool:
        """Whether the name is taken by a task that has not failed."""
        task = self._named.get(name)
        return task is not None and task.state not in (TaskState.FAILED, TaskState.CANCELED)

    @property
    def cwd(self) -> str:
        """Where its tasks start."""
        return self.config.folder or os.getcwd()

    @property
    def durability_warning(self) -> str:
        """Why what ends now could be lost, in a sentence; empty where it could not."""
        return self.recorder.durability_warning if self.recorder is not None else ""

    async def submit(
        self,
        tasks: Sequence[Task],
        accepted: list[AcceptedTask],
        stored_requests: Sequence[bytes] = (),
        submission: Submission | None = None,
    ) -> None:
        """Take what its session accepted, written down with their recipes first where there is a ledger. Nothing is
        taken where this raises: SessionClosed, or LedgerUnavailable."""
        now = time.time()
        for task in with_children(tasks):
            task.submitted = now
        if self.recorder is not None:
            await self.recorder.record_submission(tasks, stored_requests, submission)
        await self.session.submit_accepted(tasks, accepted)
        if submission is not None:
            self.submissions[submission.key] = submission
        self.add_tasks(tasks)

    def add_tasks(self, tasks: Sequence[Task]) -> None:
        """Find them by uid and name from now on."""
        for task in tasks:
            if task.name and (earlier := self._named.get(task.name)):
                self.session.replace(earlier, task.uid)
            self._tasks[task.uid] = task
            if task.name:
                self._named[task.name] = task

    async def register(self, source: Source, name: str | None, timeout_s: float) -> RegisteredFunction:
        """Keep a function for tasks to name. Raises what `Functions.check` does, and LedgerUnavailable."""
        function = await self.functions.check(source, name, timeout_s)
        if self.recorder is not None:
            await self.recorder.record_function(function)
        self.functions.add(function)
        return function
