"""The ledger as others see it: sessions and tasks with what came of them, engines and handles."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rhapsody_mcp.ledger import queries
from rhapsody_mcp.ledger.fsync import Syncer
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

__all__ = ["LOCK", "Ledger"]

_log = logging.getLogger(__name__)
LOCK = "lock"
_CLOSING_S = 30.0
_PRUNING_S = 10.0


class Ledger:
    """One a folder, held by one process at a time.

    Changes are written by a thread of its own, in the order in which they were given, and the reading methods see
    all that were given before, but for those that wait for result files to be on disk (`settled`). What is durable
    survives the end of this process, however it ends, and a power cut.
    Where the file cannot be written (`problem` says why), changes are kept and tried again twice a second; meanwhile
    the reading methods see what is in the file. Once a part of it turns out damaged, nothing is written any more.
    """

    def __init__(self, folder: Path, steps: Steps = STEPS, journal: Journal | None = None) -> None:
        """Without a journal it is the one that the file system allows."""
        self.folder = folder
        self._lock = Lock(folder / LOCK)
        self._store = Store(folder, steps, journal)
        self._writer = Writer(self._store)
        self._syncer = Syncer()
        self._open = False
        self._booted = 0.0

    def open(self) -> None:
        """Take hold of it, once; it is made where it is not there. Blocks. Raises LedgerInUse, LedgerTooNew,
        LedgerDamaged and LedgerUnavailable, each with nothing changed."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.take()
        except OSError as error:
            raise LedgerUnavailable(f"the ledger in {self.folder} cannot be opened: {error.strerror}.") from error
        try:
            self._store.open(self._lock.known)
        except BaseException:
            self._lock.give_back()
            raise
        self._writer.start()
        self._syncer.start()
        self._open, self._booted = True, time.time() - _since_boot()

    @property
    def problem(self) -> str:
        """Empty, or why nothing can be written now."""
        return self._writer.problem or self._syncer.problem

    def write(self, *changes: Change) -> None:
        """Soon, and together. Never blocks and never raises; a damaged or closed ledger takes nothing any more.

        What names files of results is written once these are on the disk: what is given later may be there earlier.
        """
        if files := _files(changes):
            self._syncer.put(files, partial(self._writer.put, changes))
        else:
            self._writer.put(changes)

    async def commit(self, *changes: Change, within_s: float = 10.0) -> None:
        """Write them together and return when they, and all that were given before, are durable, except for what
        still waits for files.

        Raises LedgerUnavailable and LedgerDamaged, with these changes withdrawn: when `within_s` is over (later where
        the disk has begun with them), and at once while more than 100,000 calls wait to be written. Cancelled, they
        are withdrawn too, unless the disk has begun with them: then they may be there.
        """
        if (files := _files(changes)) and not await self._syncer.done(files, within_s):
            raise LedgerUnavailable(self.problem or f"{files[0]} did not reach the disk within {within_s:g} s.")
        await self._writer.commit(changes, within_s)

    async def settled(self, within_s: float) -> bool:
        """Whether all that was given so far became durable in that time."""
        try:
            async with asyncio.timeout(within_s):
                await self._syncer.done((), within_s)
                await self._writer.commit((), within_s)
        except (LedgerError, TimeoutError):
            return False
        return True

    async def sessions(self) -> list[SessionRow]:
        """Oldest first."""
        return await self._writer.do(queries.sessions)

    async def tasks(self, session: str) -> list[TaskRow]:
        """By number. Of one whose result cannot be read the outcome is FAILED with cause lost, which says so."""
        found: list[TaskRow] = []
        after: queries.Place | None = queries.FIRST
        while after is not None:
            rows, after = await self._writer.do(queries.tasks(session, after))
            found += rows
        return found

    async def functions(self, session: str) -> list[FunctionRow]:
        """By number."""
        return await self._writer.do(queries.functions(session))

    async def submissions(self, session: str) -> list[SubmissionRow]:
        """In the order in which they were made."""
        return await self._writer.do(queries.submissions(session))

    async def handles(self) -> list[HandleRow]:
        return await self._writer.do(queries.handles)

    async def engines(self) -> list[EngineRow]:
        return await self._writer.do(queries.engines)

    async def number(self, name: str) -> int:
        """0 where it was never put."""
        return await self._writer.do(queries.number(name))

    async def reconcile(self, now: float) -> int:
        """For a start after a crash, once nothing of it runs any more: how many tasks ran, or were about to. Those that
        had not started, and those with attempts left, are queued again; the others become FAILED with cause lost, after
        all that ended. Tasks with children are left as they are: theirs is the end.
        Raises what `commit` raises."""
        changes = await self._writer.do(queries.left_running(now))
        await self.commit(*changes)
        if changes:
            lost = sum(isinstance(change, TaskEnded) for change in changes)
            _log.info("tasks that ran as it ended: %d lost, %d queued again", lost, len(changes) - lost)
        return len(changes)

    async def prune(self, before: float) -> list[SessionRow]:
        """Forget the sessions that were not used since then and have no unfinished tasks, and give them back: their
        files are the caller's. None are forgotten while nothing can be written. A clock that was set forward since
        the ledger was opened makes none of them older."""
        if not await self.settled(_PRUNING_S):
            return []
        return await self._writer.do(queries.forget(before - self._set_forward()))

    async def close(self) -> None:
        """Write what is left and give the lock back. A second call does nothing. Raises LedgerUnavailable, after that,
        where changes could not be written."""
        if not self._open:
            return
        self._open = False
        await self._syncer.stop(_CLOSING_S)
        if await self._writer.stop(_CLOSING_S):
            self._lock.give_back()
        if left := self._syncer.left + self._writer.left:
            raise LedgerUnavailable(f"{left:,} changes could not be written before the end: {self.problem}")

    def _set_forward(self) -> float:
        """Seconds that the clock was set forward by since the ledger was opened."""
        return max(0.0, time.time() - _since_boot() - self._booted)


def _files(changes: Iterable[Change]) -> list[str]:
    return [file for change in changes for file in change.files()]


def _since_boot() -> float:
    """Goes on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
