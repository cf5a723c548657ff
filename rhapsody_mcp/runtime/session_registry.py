"""The sessions that a server holds open for its agents, each by its id."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import anyio
import msgspec
import platformdirs

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import CloseSession, DropSession, PutNumber, PutSession, SessionRow, UseSession
from rhapsody_mcp.model.errors import InvalidRequest, UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.backend_factory import OpenBackends, Wanted
from rhapsody_mcp.runtime.call_context import current_caller
from rhapsody_mcp.runtime.functions import Functions, Registered
from rhapsody_mcp.runtime.limits import Rules, Taken
from rhapsody_mcp.runtime.recovery.orphans import reap
from rhapsody_mcp.runtime.recovery.recorder import Recorder, Submission
from rhapsody_mcp.runtime.recovery.restore import Records, restore
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.session.session import Accepted, Session
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, with_children
from rhapsody_mcp.settings import Settings

__all__ = ["OpenSession", "OpenSessions", "Records", "Submission", "Watcher"]

_log = logging.getLogger(__name__)
_OPENED = "sessions opened"
_USED_S = 60.0


class OpenSession:
    """A session whose tasks are spoken of by name or uid; results stay encoded in it.

    A name belongs to the last task that took it; it is free again once that task ended FAILED or CANCELED.
    """

    def __init__(self, id: str, session: Session, wanted: Wanted, recorder: Recorder | None = None) -> None:
        self.id, self.session, self.wanted = id, session, wanted
        self.functions = Functions(session)
        self.recorder = recorder
        self.used = time.time()
        self._tasks: dict[str, Task] = {}
        self._named: dict[str, Task] = {}
        self.submissions: dict[str, Submission] = {}
        """By idempotency key."""
        self.submitting = asyncio.Lock()
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
        of, _, number = name.removesuffix("]").rpartition("[")
        parent = self._named.get(of) or self._tasks.get(of)
        if parent is None or not is_index(number):
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

    @property
    def cwd(self) -> str:
        """Where its tasks start."""
        return self.wanted.folder or os.getcwd()

    @property
    def trouble(self) -> str:
        """Why what ends now could be lost, in a sentence; empty where it could not."""
        return self.recorder.trouble if self.recorder is not None else ""

    async def submit(
        self,
        tasks: Sequence[Task],
        accepted: list[Accepted],
        recipes: Sequence[bytes] = (),
        submission: Submission | None = None,
    ) -> None:
        """Take what its session accepted, written down with their recipes first where there is a ledger. Nothing is
        taken where this raises: SessionClosed, or LedgerUnavailable."""
        now = time.time()
        for task in with_children(tasks):
            task.submitted = now
        if self.recorder is not None:
            await self.recorder.submit(tasks, recipes, submission)
        await self.session.take(tasks, accepted)
        if submission is not None:
            self.submissions[submission.key] = submission
        self.have(tasks)

    def have(self, tasks: Sequence[Task]) -> None:
        """Find them by uid and name from now on."""
        for task in tasks:
            if task.name and (earlier := self._named.get(task.name)):
                self.session.replace(earlier, task.uid)
            self._tasks[task.uid] = task
            if task.name:
                self._named[task.name] = task

    async def register(self, source: Source, name: str | None, timeout_s: float) -> Registered:
        """Keep a function for tasks to name. Raises what `Functions.check` does, and LedgerUnavailable."""
        function = await self.functions.check(source, name, timeout_s)
        if self.recorder is not None:
            await self.recorder.register(function)
        self.functions.keep(function)
        return function


Watcher = Callable[[OpenSession, Task | None], None]


class OpenSessions:
    """Leaving `async with` ends everything that they started. With records, the sessions go on in the next life:
    tasks that had not started are still queued, and those that ran are lost. Without, they are closed."""

    def __init__(
        self,
        open_backends: OpenBackends,
        records: Records | None = None,
        engine_idle_s: float | None = None,
        settings: Settings | None = None,
    ) -> None:
        """`settings` hold the sessions to their limits and policy."""
        self._open_backends = open_backends
        self._records, self._engine_idle_s = records, engine_idle_s
        self._sessions: dict[str, OpenSession] = {}
        self._closing: set[OpenSession] = set()
        self.rules = Rules(settings or Settings(), self._taken, records.folder if records else None)
        self._opened = 0
        self._watchers: list[Watcher] = []
        self.restored = asyncio.Event()
        """Set once the sessions of the earlier life are here."""
        if records is None:
            self.restored.set()

    @property
    def ledger(self) -> Ledger | None:
        return self._records and self._records.ledger

    @property
    def state(self) -> Path:
        """Where the ledger is, or would be."""
        return self._records.folder if self._records else platformdirs.user_state_path("rhapsody-mcp")

    def note_life(self) -> None:
        """Write down that sessions with something to do live now: if this process is killed, what they ran is taken to
        have ended soon after."""
        for opened in self._sessions.values():
            if opened.recorder is not None and opened.session.taken.open:
                opened.recorder.write(UseSession(opened.recorder.key, time.time()))

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Call it after each change of a task of any session, and with no task when a session was opened or closed,
        until what this gives back is called."""
        self._watchers.append(watcher)
        return partial(self._watchers.remove, watcher)

    def _tell(self, opened: OpenSession, task: Task | None = None) -> None:
        if task is not None and opened.recorder is not None:
            opened.recorder.changed(task)
        for watcher in self._watchers:
            watcher(opened, task)

    async def open(self, wanted: Wanted, id: str | None = None) -> OpenSession:
        """A new session; its engines start when its first tasks need them. Without an id it is session-N.

        Raises InvalidRequest where there is one of this id, LimitExceeded, what the backends refuse, and
        LedgerUnavailable.
        """
        if id in self._sessions:
            raise InvalidRequest(f"a session named {id!r} is open already; use it, or take another name.")
        self.rules.refuse_session()
        backends = self._open_backends(wanted)
        id = id or self._next_id()
        opened = self._make(f"{id}.{time.time_ns():x}", wanted, backends)
        try:
            await self._write_down(opened)
        except BaseException:
            del self._sessions[id]
            raise
        self._tell(opened)
        return opened

    async def _write_down(self, opened: OpenSession) -> None:
        """Nothing of it is left where this raises, as it does when whoever asked for the session has gone."""
        if opened.recorder is None or self._records is None:
            return
        try:
            await self._records.ledger.commit(PutSession(self._row(opened)), PutNumber(_OPENED, self._opened))
        except BaseException:
            opened.recorder.write(DropSession(opened.recorder.key))
            shutil.rmtree(opened.session.folder, ignore_errors=True)
            raise

    def _next_id(self) -> str:
        while True:
            self._opened += 1
            if (id := f"session-{self._opened}") not in self._sessions:
                return id

    def _make(self, key: str, wanted: Wanted, backends: Sequence[Backend]) -> OpenSession:
        """`key` is the id with what tells it from others of that id: one may be open while another one closes."""
        id, records = key.rpartition(".")[0], self._records
        folder = records and records.folder / "sessions" / key
        session = Session(
            backends, opens_results=False, engine_idle_s=self._engine_idle_s, folder=folder, rules=self.rules
        )
        recorder = records and Recorder(records.ledger, key, session)
        for backend in backends:
            if recorder is not None:
                backend.book, backend.before_start = recorder.engines, recorder.starting
        opened = OpenSession(id, session, wanted, recorder)
        session.on_change = partial(self._tell, opened)
        self._sessions[id] = opened
        return opened

    def _row(self, opened: OpenSession) -> SessionRow:
        assert opened.recorder is not None, "with records, each session has one"
        return SessionRow(
            id=opened.recorder.key,
            created=opened.used,
            used=opened.used,
            wanted=msgspec.json.encode(opened.wanted),
            client=current_caller.get(),
            folder=str(opened.session.folder),
            closing=False,
        )

    def _taken(self) -> list[Taken]:
        return [opened.session.taken for opened in self.all()]

    def all(self) -> list[OpenSession]:
        """Oldest first."""
        return list(self._sessions.values())

    def get(self, id: str) -> OpenSession:
        if (found := self._sessions.get(id)) is None:
            raise UnknownName("session", id, self._sessions)
        if found.recorder is not None and (now := time.time()) - found.used > _USED_S:
            found.used = now
            found.recorder.write(UseSession(found.recorder.key, now))
        return found

    # --- the earlier life

    async def restore(self) -> None:
        """Have the sessions of the earlier life again, and run what had not ended. Raises nothing for one session:
        what of it cannot be had is told in the log, and stays in the ledger."""
        if self._records is None:
            return
        try:
            for told in await reap(self._records.ledger):
                _log.warning("%s", told)
            await self._records.ledger.reconcile(time.time())
            self._opened = await self._records.ledger.number(_OPENED)
            for row in await self._records.ledger.sessions():
                await self._restore(row, self._records)
            self._say_what_goes_on()
        finally:
            self.restored.set()

    def _say_what_goes_on(self) -> None:
        if self._sessions:
            left = sum(not task.state.final for one in self.all() for task in leaves(one.session.tasks))
            _log.info("opened again: %d sessions with %d tasks that have not ended", len(self._sessions), left)

    async def _restore(self, row: SessionRow, records: Records) -> None:
        if row.closing:
            await asyncio.to_thread(shutil.rmtree, row.folder, ignore_errors=True)
            records.ledger.write(DropSession(row.id))
            return
        try:
            wanted = msgspec.json.decode(row.wanted, type=Wanted)
            opened = self._make(row.id, wanted, self._open_backends(wanted))
            await restore(opened, records, row.id)
            self._tell(opened)
        except Exception:  # one session that cannot be read must not keep the others away
            self._sessions.pop(row.id.rpartition(".")[0], None)
            _log.exception("session %r of an earlier life cannot be opened again", row.id)

    async def prune(self, before: float) -> None:
        """Forget sessions that nobody has used since then, their results too; not those that have tasks to do."""
        if self._records is None:
            return
        for row in await self._records.ledger.prune(before):
            opened = self._sessions.pop(row.id.rpartition(".")[0], None)
            if opened is not None:
                opened.session.on_change = None
                self._tell(opened)
                await opened.session.close()
            await asyncio.to_thread(shutil.rmtree, row.folder, ignore_errors=True)

    # --- closing

    async def close(self, id: str) -> OpenSession:
        """Close one and give it back. Its id is free at once; that it ends does not hang on the caller."""
        closing = self.get(id)
        del self._sessions[id]
        if closing.recorder is not None:
            closing.recorder.write(CloseSession(closing.recorder.key))
        self._tell(closing)
        await self._close(closing)
        return closing

    async def _close(self, closing: OpenSession) -> None:
        self._closing.add(closing)
        await closing.session.close()
        if closing.recorder is not None:
            await asyncio.to_thread(shutil.rmtree, closing.session.folder, ignore_errors=True)
            closing.recorder.write(DropSession(closing.recorder.key))
        self._closing.discard(closing)

    async def close_all(self) -> None:
        """Close every session, those whose closing was given up too, and return when nothing is left of them."""
        leaving = {*self._sessions.values(), *self._closing}
        self._sessions.clear()
        await _all(self._close(session) for session in leaving)

    async def suspend(self) -> None:
        """End everything that they started, and keep them in the ledger as they were."""
        self.note_life()
        leaving = list(self._sessions.values())
        self._sessions.clear()
        for opened in leaving:
            opened.session.on_change = opened.recorder.suspended if opened.recorder is not None else None
        await _all([*(opened.session.close() for opened in leaving), *(self._close(one) for one in self._closing)])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await (self.close_all() if self._records is None else self.suspend())


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run these to their ends, whatever becomes of the caller; raise the first error of them."""
    with anyio.CancelScope(shield=True):
        ends = await asyncio.gather(*works, return_exceptions=True)
    for error in ends:
        if isinstance(error, BaseException):
            raise error
