"""The sessions that a server holds open for its agents, each by its id."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple, Self

import anyio

from rhapsody_mcp.model.errors import InvalidRequest, UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.functions import Functions
from rhapsody_mcp.runtime.opening import OpenBackends, Wanted
from rhapsody_mcp.runtime.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task

__all__ = ["OpenSession", "OpenSessions", "Submission", "Watcher"]


class Submission(NamedTuple):
    """A call that gave an idempotency key: what it asked for, in a form that can be compared, and what it made."""

    key: str
    asked: object
    tasks: tuple[Task, ...]


class OpenSession:
    """A session whose tasks are spoken of by name or uid; results stay encoded in it.

    A name belongs to the last task that took it; it is free again once that task ended FAILED or CANCELED.
    """

    def __init__(self, id: str, session: Session, wanted: Wanted) -> None:
        self.id, self.session, self.wanted = id, session, wanted
        self.functions = Functions(session)
        self._tasks: dict[str, Task] = {}
        self._named: dict[str, Task] = {}
        self.submissions: dict[str, Submission] = {}
        """By idempotency key."""

    def new_uids(self, count: int) -> list[str]:
        """The next uids; they are taken only by a submission that is."""
        taken = len(self._tasks)
        return [f"task.{taken + number:06d}" for number in range(1, count + 1)]

    def task(self, name: str) -> Task:
        """Also one of a for_each, as in `sweep[3]`. Raises UnknownName, which knows the names that there are."""
        if (task := self._named.get(name) or self._tasks.get(name) or self._child(name)) is None:
            raise UnknownName("task", name, self._named or self._tasks)
        return task

    def _child(self, name: str) -> Task | None:
        of, _, number = name.removesuffix("]").rpartition("[")
        parent = self._named.get(of) or self._tasks.get(of)
        if parent is None or not number.isdecimal():
            return None
        children = parent.children if isinstance(parent, ForEach) else []
        if int(number) < len(children):
            return children[int(number)]
        there = f"{of}[0] to {of}[{len(children) - 1}]" if children else f"{of}, which has no tasks of its own"
        raise UnknownName("task", name, (), there)

    def tasks(self, names: Collection[str]) -> list[Task]:
        return [self.task(name) for name in dict.fromkeys(names)]

    def named(self, name: str) -> Task | None:
        """The task that has this name."""
        return self._named.get(name)

    def has_name(self, name: str) -> bool:
        """Whether the name is taken by a task that has not failed."""
        task = self._named.get(name)
        return task is not None and task.state not in (TaskState.FAILED, TaskState.CANCELED)

    async def submit(self, tasks: Sequence[Task], submission: Submission | None = None) -> None:
        await self.session.submit_tasks(tasks)
        if submission is not None:
            self.submissions[submission.key] = submission
        for task in tasks:
            if task.name and (earlier := self._named.get(task.name)):
                earlier.replaced_by = task.uid
        self._tasks.update({task.uid: task for task in tasks})
        self._named.update({task.name: task for task in tasks if task.name})


Watcher = Callable[[OpenSession, Task | None], None]


class OpenSessions:
    """Leaving `async with` closes them all: nothing that they started is left."""

    def __init__(self, open_backends: OpenBackends) -> None:
        self._open_backends = open_backends
        self._sessions: dict[str, OpenSession] = {}
        self._closing: set[OpenSession] = set()
        self._opened = 0
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        """Call it after each change of a task of any session, and with no task when a session was opened or closed."""
        self._watchers.append(watcher)

    def _tell(self, opened: OpenSession, task: Task | None = None) -> None:
        for watcher in self._watchers:
            watcher(opened, task)

    def open(self, wanted: Wanted, id: str | None = None) -> OpenSession:
        """A new session; its engines start when its first tasks need them. Without an id it is session-N."""
        if id in self._sessions:
            raise InvalidRequest(f"a session named {id!r} is open already; use it, or take another name.")
        session = Session(self._open_backends(wanted), opens_results=False)
        opened = OpenSession(id or self._next_id(), session, wanted)
        self._sessions[opened.id] = opened
        session.on_change = partial(self._tell, opened)
        self._tell(opened)
        return opened

    def _next_id(self) -> str:
        while True:
            self._opened += 1
            if (id := f"session-{self._opened}") not in self._sessions:
                return id

    def all(self) -> list[OpenSession]:
        """Oldest first."""
        return list(self._sessions.values())

    def get(self, id: str) -> OpenSession:
        if (found := self._sessions.get(id)) is None:
            raise UnknownName("session", id, self._sessions)
        return found

    async def close(self, id: str) -> OpenSession:
        """Close one and give it back. Its id is free at once; that it ends does not hang on the caller."""
        closing = self.get(id)
        del self._sessions[id]
        self._tell(closing)
        await self._close(closing)
        return closing

    async def _close(self, closing: OpenSession) -> None:
        self._closing.add(closing)
        await closing.session.close()
        self._closing.discard(closing)

    async def close_all(self) -> None:
        """Close every session, those whose closing was given up too, and return when nothing is left of them."""
        leaving = {*self._sessions.values(), *self._closing}
        self._sessions.clear()
        with anyio.CancelScope(shield=True):
            ends = await asyncio.gather(*(self._close(session) for session in leaving), return_exceptions=True)
        for error in ends:
            if isinstance(error, BaseException):
                raise error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_all()
