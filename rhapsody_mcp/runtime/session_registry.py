"""The open sessions of a server, by id."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import anyio
import msgspec
import platformdirs

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.backends.pilot.saved_events import has_events
from rhapsody_mcp.backends.pilot.submission import has_allocation
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import CloseSession, DropSession, PutNumber, PutSession, SessionRow, UseSession
from rhapsody_mcp.model.errors import InvalidRequest, UnknownName
from rhapsody_mcp.runtime.backend_factory import OpenBackends, SessionConfig
from rhapsody_mcp.runtime.call_context import current_caller
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from rhapsody_mcp.runtime.limits import Limits, SessionUsage
from rhapsody_mcp.runtime.mpi_record import MpiRecord
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.recovery.orphans import end_orphans
from rhapsody_mcp.runtime.recovery.recorder import Recorder, Storage
from rhapsody_mcp.runtime.recovery.restore import restore
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import Task, leaves
from rhapsody_mcp.settings import Settings

__all__ = ["SessionRegistry", "Watcher"]

_log = logging.getLogger(__name__)
_NUMBER_KEY = "sessions opened"
_USE_INTERVAL_S = 60.0


Watcher = Callable[[OpenSession, Task | None], None]


class SessionRegistry:
    """Opens, restores and closes sessions. Leaving `async with` ends every process of the sessions.

    With storage, the next run of the server restores the sessions: tasks that had not started run then, and tasks that
    were running end with cause lost. Without storage, the sessions are closed.
    """

    def __init__(
        self,
        open_backends: OpenBackends,
        storage: Storage | None = None,
        engine_idle_s: float | None = None,
        settings: Settings | None = None,
    ) -> None:
        """`settings` are the limits and the policy of all sessions."""
        self._open_backends = open_backends
        self._storage, self._engine_idle_s = storage, engine_idle_s
        self._sessions: dict[str, OpenSession] = {}
        self._closing: set[OpenSession] = set()
        self._closing_again: list[asyncio.Task[None]] = []
        """The sessions with an allocation whose closing the previous run did not finish."""
        self.limits = Limits(settings or Settings(), self._usages, storage.folder if storage else None)
        self._last_number = 0
        self._watchers: list[Watcher] = []
        self.mpi = MpiRecord()
        self.restored = asyncio.Event()
        """Set once the sessions of the previous run are restored."""
        if storage is None:
            self.restored.set()

    @property
    def ledger(self) -> Ledger | None:
        return self._storage and self._storage.ledger

    @property
    def state_folder(self) -> Path:
        """The folder of the ledger. Without storage, the folder in which a ledger would be."""
        return self._storage.folder if self._storage else platformdirs.user_state_path("rhapsody-mcp")

    def write_heartbeats(self) -> None:
        """Write the current time for each session that has unfinished tasks.

        If this process is killed, tasks that were running are taken to have ended shortly after this time.
        """
        for opened in self._sessions.values():
            if opened.recorder is not None and opened.session.usage.open:
                opened.recorder.write(UseSession(opened.recorder.key, time.time()))

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Call the watcher after each change of a task and its progress, and with None for the task after a session is
        opened or closed.

        Calling the returned function ends this.
        """
        self._watchers.append(watcher)
        return partial(self._watchers.remove, watcher)

    def _notify(self, opened: OpenSession, task: Task | None = None) -> None:
        if task is not None and opened.recorder is not None:
            opened.recorder.record_change(task)
        if task is not None and task.outcome is not None:
            self.mpi.heed(opened, task)
        self._tell_watchers(opened, task)

    def _tell_watchers(self, opened: OpenSession, task: Task | None) -> None:
        for watcher in self._watchers:
            watcher(opened, task)

    async def open(self, config: SessionConfig, id: str | None = None) -> OpenSession:
        """Open a session. Its engines start when its first tasks need them. The default id is session-N.

        Raises InvalidRequest where an open session has this id, LimitExceeded, LedgerUnavailable, and what
        `plan_backends` raises.
        """
        if id in self._sessions:
            raise InvalidRequest(f"a session named {id!r} is open already; use it, or take another name.")
        self.limits.refuse_session()
        backends = self._open_backends(config)
        id = id or self._next_id()
        opened = self._create(f"{id}.{time.time_ns():x}", config, backends)
        try:
            await self._record_opening(opened)
        except BaseException:
            del self._sessions[id]
            raise
        self._notify(opened)
        return opened

    async def _record_opening(self, opened: OpenSession) -> None:
        """Make the session durable. Where this raises or is cancelled, nothing of the session is left on the disk."""
        if opened.recorder is None or self._storage is None:
            return
        try:
            await self._storage.ledger.commit(
                PutSession(self._session_row(opened)), PutNumber(_NUMBER_KEY, self._last_number)
            )
        except BaseException:
            opened.recorder.write(DropSession(opened.recorder.key))
            shutil.rmtree(opened.session.folder, ignore_errors=True)
            raise

    def _next_id(self) -> str:
        while True:
            self._last_number += 1
            if (id := f"session-{self._last_number}") not in self._sessions:
                return id

    def _create(self, key: str, config: SessionConfig, backends: Sequence[Backend]) -> OpenSession:
        """`key` is the id with a unique suffix: a new session may have the id of a session that is still closing."""
        id, storage = key.rpartition(".")[0], self._storage
        folder = storage and storage.folder / "sessions" / key
        session = Session(
            backends,
            id,
            opens_results=False,
            engine_idle_s=self._engine_idle_s,
            folder=folder,
            limits=self.limits,
            software=msgspec.to_builtins(config.software),
            package_cache=PackageCache(self.state_folder / "environments", config.folder),
        )
        recorder = storage and Recorder(storage.ledger, key, session)
        for backend in backends:
            if recorder is not None:
                backend.book, backend.before_start = recorder.engine_book, recorder.before_start
        opened = OpenSession(id, session, config, recorder)
        session.on_change.add(partial(self._notify, opened))
        session.on_progress.add(partial(self._tell_watchers, opened))
        self._sessions[id] = opened
        return opened

    def _session_row(self, opened: OpenSession) -> SessionRow:
        assert opened.recorder is not None, "with storage, each session has one"
        return SessionRow(
            id=opened.recorder.key,
            created=opened.last_used,
            used=opened.last_used,
            wanted=msgspec.json.encode(opened.config),
            client=current_caller.get(),
            folder=str(opened.session.folder),
            closing=False,
        )

    def _usages(self) -> list[SessionUsage]:
        return [opened.session.usage for opened in self.all()]

    def all(self) -> list[OpenSession]:
        """The open sessions, oldest first."""
        return list(self._sessions.values())

    def get(self, id: str) -> OpenSession:
        if (opened := self._sessions.get(id)) is None:
            raise UnknownName("session", id, self._sessions)
        if opened.recorder is not None and (now := time.time()) - opened.last_used > _USE_INTERVAL_S:
            opened.last_used = now
            opened.recorder.write(UseSession(opened.recorder.key, now))
        return opened

    # --- restoring

    async def restore(self) -> None:
        """Restore the sessions of the previous run, and run their unfinished tasks.

        A session that cannot be restored is logged and stays in the ledger; nothing is raised for a single session.
        """
        if self._storage is None:
            return
        try:
            for sentence in await end_orphans(self._storage.ledger):
                _log.warning("%s", sentence)
            rows = await self._storage.ledger.sessions()
            with_allocation = {row.id for row in rows if _may_run_on(row)}
            await self._storage.ledger.reconcile(time.time(), with_allocation)
            self._last_number = await self._storage.ledger.number(_NUMBER_KEY)
            for row in sorted(
                rows, key=lambda row: not row.closing
            ):  # an open session may have the id of a closing one
                await self._restore_session(row, self._storage, row.id in with_allocation)
            self._closing_again = [asyncio.create_task(self._close(opened)) for opened in self._closing]
            self._log_restored()
        finally:
            self.restored.set()

    def _log_restored(self) -> None:
        if self._sessions:
            unfinished = sum(not task.state.final for opened in self.all() for task in leaves(opened.session.tasks))
            _log.info("opened again: %d sessions with %d tasks that have not ended", len(self._sessions), unfinished)

    async def _restore_session(self, row: SessionRow, storage: Storage, has_allocation: bool) -> None:
        if row.closing and not has_allocation:
            await asyncio.to_thread(shutil.rmtree, row.folder, ignore_errors=True)
            storage.ledger.write(DropSession(row.id))
            return
        try:
            config = msgspec.json.decode(row.wanted, type=SessionConfig)
            opened = self._create(row.id, config, self._open_backends(config))
            if row.closing:
                del self._sessions[opened.id]
                self._closing.add(opened)
                return
            await restore(opened, storage.ledger, row.id)
            self._notify(opened)
        except Exception:  # a session that cannot be read must not prevent the others
            self._sessions.pop(row.id.rpartition(".")[0], None)
            _log.exception("session %r of an earlier life cannot be opened again", row.id)

    async def prune(self, before: float) -> None:
        """Delete sessions that were last used before this time (seconds since the epoch), with their results.

        Sessions with unfinished tasks stay.
        """
        if self._storage is None:
            return
        for row in await self._storage.ledger.prune(before):
            opened = self._sessions.pop(row.id.rpartition(".")[0], None)
            if opened is not None:
                opened.session.on_change.clear()
                self._notify(opened)
                await opened.session.close()
            await asyncio.to_thread(shutil.rmtree, row.folder, ignore_errors=True)

    # --- closing

    async def close(self, id: str) -> OpenSession:
        """Close a session and return it. Its id is free at once. A cancelled caller does not leave it half closed."""
        closing = self.get(id)
        del self._sessions[id]
        if closing.recorder is not None:
            closing.recorder.write(CloseSession(closing.recorder.key))
        self._notify(closing)
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
        """Close every session, also those whose `close` was cancelled. Returns when nothing of them is left."""
        sessions = {*self._sessions.values(), *self._closing}
        self._sessions.clear()
        await _run_all(self._close(opened) for opened in sessions)

    async def suspend(self) -> None:
        """End every process of the sessions, and leave the sessions in the ledger as they are."""
        self.write_heartbeats()
        suspended = list(self._sessions.values())
        self._sessions.clear()
        for opened in suspended:
            opened.session.on_change.clear()
            if opened.recorder is not None:
                opened.session.on_change.add(opened.recorder.record_while_suspending)
            for backend in opened.session.backends:
                backend.detach()
        await _run_all(
            [*(opened.session.close() for opened in suspended), *(self._close(closing) for closing in self._closing)]
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await (self.close_all() if self._storage is None else self.suspend())


async def _run_all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run the coroutines to their ends, also where the caller is cancelled. Raises the first of their errors."""
    with anyio.CancelScope(shield=True):
        results = await asyncio.gather(*coroutines, return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            raise error


def _may_run_on(row: SessionRow) -> bool:
    """Whether tasks of the session may run in an allocation, or have ended there without an entry in the ledger."""
    folder = Path(row.folder)
    return has_allocation(folder) or (not row.closing and has_events(folder))
