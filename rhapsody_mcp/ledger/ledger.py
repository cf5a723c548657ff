"""The interface of the ledger: sessions, tasks with their outcomes, engines and handles."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

from rhapsody_mcp.ledger import queries
from rhapsody_mcp.ledger.fsync import FsyncThread
from rhapsody_mcp.ledger.lock import Lock
from rhapsody_mcp.ledger.records import (
    Change,
    EngineRow,
    FunctionRow,
    HandleRow,
    SessionRow,
    SubmissionRow,
    TaskEnded,
    TaskRow,
)
from rhapsody_mcp.ledger.schema import STEPS, Steps
from rhapsody_mcp.ledger.store import Journal, Store
from rhapsody_mcp.ledger.writer import Writer
from rhapsody_mcp.model.errors import LedgerError, LedgerUnavailable

__all__ = ["LOCK_FILE", "Ledger"]

_log = logging.getLogger(__name__)
LOCK_FILE = "lock"
_CLOSE_TIMEOUT_S = 30.0
_PRUNE_TIMEOUT_S = 10.0


class Ledger:
    """The ledger of a folder, open in one process at a time.

    A thread writes changes in their order. Reading methods see all earlier changes, except those that wait until
    result files are on the disk (see `flush`). Durable changes survive every end of this process, and a power cut.
    While the file cannot be written (`problem` says why), changes stay in memory and are tried again twice a second;
    the reading methods then see the content of the file. Once the file turns out damaged, nothing more is written.
    """

    def __init__(self, folder: Path, steps: Steps = STEPS, journal: Journal | None = None) -> None:
        """The default journal is the one that the file system allows."""
        self.folder = folder
        self._lock = Lock(folder / LOCK_FILE)
        self._store = Store(folder, steps, journal)
        self._writer = Writer(self._store)
        self._fsync = FsyncThread()
        self._open = False
        self._boot_time = 0.0

    def open(self) -> None:
        """Open the ledger, or make a new one. Blocks; call it once. Raises LedgerInUse, LedgerTooNew, LedgerDamaged
        and LedgerUnavailable, with nothing changed."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise LedgerUnavailable(f"the ledger in {self.folder} cannot be opened: {error.strerror}.") from error
        try:
            self._store.open(self._lock.is_supported)
        except BaseException:
            self._lock.release()
            raise
        self._writer.start()
        self._fsync.start()
        self._open, self._boot_time = True, time.time() - _uptime_s()

    def beat(self) -> bool:
        """Let other hosts see that the holder of this ledger lives; to be called each second. Blocks while the file
        system does not answer. Return False where another host has taken the ledger over."""
        return self._lock.beat()

    @property
    def problem(self) -> str:
        """Why nothing can be written now; else empty."""
        return self._writer.problem or self._fsync.problem

    def write(self, *changes: Change) -> None:
        """Queue changes that are written together. Never blocks or raises; a damaged or closed ledger drops them.

        Changes that name result files are written once the files are on the disk, perhaps after later changes.
        """
        if files := _files(changes):
            self._fsync.put(files, partial(self._writer.put, changes))
        else:
            self._writer.put(changes)

    async def commit(self, *changes: Change, timeout_s: float = 10.0) -> None:
        """Write changes together; returns when they and all earlier changes are durable, except earlier changes that
        still wait for files.

        Raises LedgerUnavailable and LedgerDamaged, with these changes withdrawn: when `timeout_s` is over (later if
        their commit has begun), and at once while more than 100,000 writes are queued. Cancellation withdraws the
        changes too; if their commit has begun, they may be written.
        """
        if (files := _files(changes)) and not await self._fsync.sync(files, timeout_s):
            raise LedgerUnavailable(self.problem or f"{files[0]} did not reach the disk within {timeout_s:g} s.")
        await self._writer.commit(changes, timeout_s)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all changes so far are durable; False where that takes longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._fsync.sync((), timeout_s)
                await self._writer.commit((), timeout_s)
        except (LedgerError, TimeoutError):
            return False
        return True

    async def sessions(self) -> list[SessionRow]:
        """Oldest first."""
        return await self._writer.run(queries.sessions)

    async def tasks(self, session: str) -> list[TaskRow]:
        """By number. A task with an unreadable outcome gets the outcome FAILED with cause lost."""
        tasks: list[TaskRow] = []
        cursor: queries.Cursor | None = queries.START
        while cursor is not None:
            page, cursor = await self._writer.run(queries.tasks(session, cursor))
            tasks += page
        return tasks

    async def functions(self, session: str) -> list[FunctionRow]:
        """By number."""
        return await self._writer.run(queries.functions(session))

    async def submissions(self, session: str) -> list[SubmissionRow]:
        """Oldest first."""
        return await self._writer.run(queries.submissions(session))

    async def handles(self) -> list[HandleRow]:
        return await self._writer.run(queries.handles)

    async def engines(self) -> list[EngineRow]:
        return await self._writer.run(queries.engines)

    async def number(self, name: str) -> int:
        """A counter's value; 0 for an unknown name."""
        return await self._writer.run(queries.number(name))

    async def reconcile(self, now: float, kept: Collection[str] = ()) -> int:
        """Settle the tasks that a crash interrupted, once none of their processes runs. Tasks that had not started, and
        those with attempts left, are queued again; the others become FAILED with cause lost, after all earlier ends.
        Tasks with children stay as they are: their children determine their end; so do the tasks of the sessions in
        `kept`, whose tasks may run on.
        Returns the number of interrupted tasks. Raises as `commit`."""
        changes = await self._writer.run(queries.interrupted_tasks(now, kept))
        await self.commit(*changes)
        if changes:
            lost = sum(isinstance(change, TaskEnded) for change in changes)
            _log.info("tasks that ran as it ended: %d lost, %d queued again", lost, len(changes) - lost)
        return len(changes)

    async def prune(self, before: float) -> list[SessionRow]:
        """Delete the sessions that were last used before this time and have no unfinished tasks, and return them; the
        caller deletes their files. Deletes none while nothing can be written. A clock that was set forward since the
        ledger was opened makes no session older."""
        if not await self.flush(_PRUNE_TIMEOUT_S):
            return []
        return await self._writer.run(queries.prune(before - self._clock_jump_s()))

    async def close(self) -> None:
        """Write the queued changes and release the lock. A second call does nothing. Raises LedgerUnavailable, after
        the release, where changes could not be written."""
        if not self._open:
            return
        self._open = False
        await self._fsync.stop(_CLOSE_TIMEOUT_S)
        if await self._writer.stop(_CLOSE_TIMEOUT_S):
            self._lock.release()
        if pending := self._fsync.pending + self._writer.pending:
            raise LedgerUnavailable(f"{pending:,} changes could not be written before the end: {self.problem}")

    def _clock_jump_s(self) -> float:
        """How far the clock was set forward since the ledger was opened."""
        return max(0.0, time.time() - _uptime_s() - self._boot_time)


def _files(changes: Iterable[Change]) -> list[str]:
    return [file for change in changes for file in change.files()]


def _uptime_s() -> float:
    """Counts the time in which the machine sleeps, if the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
