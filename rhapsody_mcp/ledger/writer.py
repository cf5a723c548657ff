"""A thread that writes changes in groups, and does what is to be read between them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from rhapsody_mcp.ledger.records import Change, PutNumber
from rhapsody_mcp.ledger.store import Store
from rhapsody_mcp.ledger.write_queue import Entry, Job, Waiter
from rhapsody_mcp.model.errors import LedgerDamaged, LedgerError, LedgerUnavailable

__all__ = ["MOST_WAITING", "Writer"]

T = TypeVar("T")

MOST_WAITING = 100_000
"""With more calls than this waiting to be written, `commit` refuses at once."""
_MOST_AT_ONCE = 1000
_GATHER_S = 0.02
_AGAIN_S = 0.5
_log = logging.getLogger(__name__)


class Writer:
    """What is put is written in the order in which it came: at once where nothing is going on and where someone
    waits for it, else with all that comes within 20 ms, up to 1,000 at once.

    `problem` is empty, or says why nothing can be written now; it is tried again twice a second.
    """

    def __init__(self, store: Store) -> None:
        self.problem = ""
        self._store = store
        self._damage: LedgerDamaged | None = None
        self._waiting: deque[Entry] = deque()
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._last = 0
        self._one_by_one = 0
        self._next_write = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # --- from the event loop

    def put(self, changes: tuple[Change, ...]) -> None:
        """Never waits. What can never be written, since the file is damaged or the writer stopped, is dropped."""
        self._put(changes, None)

    async def commit(self, changes: tuple[Change, ...], within_s: float) -> None:
        """Returns when they are durable; else they are withdrawn. Raises LedgerUnavailable and LedgerDamaged.

        Where the disk has begun with them when the time is up, that is waited for.
        """
        if changes and len(self._waiting) > MOST_WAITING:
            raise self._too_late(f"{len(self._waiting):,} changes wait to be written")
        waiter = Waiter()
        entry = self._put(changes, waiter)
        try:
            await asyncio.wait({waiter.future}, timeout=within_s)
        except asyncio.CancelledError:
            self._withdraw(entry)
            waiter.future.cancel()
            raise
        if not waiter.future.done() and self._withdraw(entry):
            waiter.future.cancel()
            raise self._too_late(f"it took longer than {within_s:g} s")
        await waiter.future

    async def do(self, work: Callable[[Store], T]) -> T:
        """What `work` gives, done in the thread after what was put before, where that can be written."""
        waiter = Waiter()
        with self._changed:
            if self._stopping:
                raise self._refusal()
            self._jobs.append(Job(self._last, work, waiter))
            self._hurry()
        result: T = await waiter.future
        return result

    async def stop(self, within_s: float) -> bool:
        """Write what is left, or try to once more, and close the store. False where a disk that does not answer keeps
        that from ending in time; `left` counts the changes that could not be written."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, within_s)
        return not self._thread.is_alive()

    @property
    def left(self) -> int:
        """How many changes wait to be written."""
        return sum(len(entry.changes) for entry in self._waiting)

    def _put(self, changes: tuple[Change, ...], waiter: Waiter | None) -> Entry:
        with self._changed:
            self._last += 1
            entry = Entry(self._last, changes, waiter)
            if self._damage is not None or self._stopping:
                self._drop(entry)
                return entry
            self._waiting.append(entry)
            if waiter is not None:
                self._hurry()
            elif len(self._waiting) in (1, _MOST_AT_ONCE):
                self._changed.notify()
        return entry

    def _drop(self, entry: Entry) -> None:
        entry.tell(self._refusal())
        if self._stopping and entry.waiter is None:
            _log.error("%r came after the ledger was closed", entry.changes)

    def _hurry(self) -> None:
        if not self.problem:
            self._next_write = 0.0
        self._changed.notify()

    def _withdraw(self, entry: Entry) -> bool:
        """Whether that was in time."""
        with self._changed:
            entry.withdrawn = True
            if entry.committing:
                return False
            with suppress(ValueError):
                self._waiting.remove(entry)
            return True

    def _too_late(self, why: str) -> LedgerUnavailable:
        slow = f"the ledger {self._store.path} cannot be written fast enough: {why}. Try again later."
        return LedgerUnavailable(self.problem or slow)

    def _refusal(self) -> LedgerError:
        if self._damage is not None:
            return LedgerDamaged(str(self._damage))
        return LedgerUnavailable(self.problem or f"the ledger {self._store.path} is closed.")

    # --- in the thread

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                if self._is_due():
                    self._write_some()
                if (job := self._next_job()) is not None:
                    self._jobs.popleft()
                    self._do(job)
        finally:
            self._finish()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._stopping or self._is_due() or self._next_job()):
                self._changed.wait(self._next_write - time.monotonic() if self._has_to_write else None)
            return not self._stopping

    def _is_due(self) -> bool:
        full = not self.problem and len(self._waiting) >= _MOST_AT_ONCE
        return self._has_to_write and (full or time.monotonic() >= self._next_write)

    @property
    def _has_to_write(self) -> bool:
        """Also where nothing waits: only another try tells that a problem is over."""
        return bool(self._waiting or (self.problem and self._damage is None))

    def _next_job(self) -> Job | None:
        job = self._jobs[0] if self._jobs else None
        ready = job is not None and (self.problem or not self._waiting or self._waiting[0].number > job.after)
        return job if ready else None

    def _do(self, job: Job) -> None:
        try:
            result = job.work(self._store)
        except LedgerDamaged as error:
            self._give_up(error)
            job.waiter.tell(error=error)
        except Exception as error:
            job.waiter.tell(error=error)
        else:
            job.waiter.tell(result)

    def _finish(self) -> None:
        if self._damage is None:
            self.problem = ""
        while self._waiting and not self.problem:
            self._write_some()
        with self._changed:
            self._stopping = True
            for entry in self._waiting:
                entry.tell(self._refusal())
            for job in self._jobs:
                job.waiter.tell(error=self._refusal())
        self._store.close()

    def _write_some(self) -> None:
        batch = self._take()
        try:
            self._write(batch)
        except LedgerUnavailable as error:
            self._put_off(str(error))
        except LedgerDamaged as error:
            self._give_up(error)
        except Exception as error:
            self._go_on_without(batch, error)

    def _take(self) -> list[Entry]:
        with self._changed:
            batch = list(itertools.islice(self._waiting, 1 if self._one_by_one else _MOST_AT_ONCE))
            self._one_by_one = max(0, self._one_by_one - 1)
            self._next_write = time.monotonic() + _GATHER_S if len(batch) == len(self._waiting) else 0.0
        return batch

    def _write(self, batch: list[Entry]) -> None:
        changes = [change for entry in batch for change in entry.changes]
        self._store.begin(changes or [_TRY])
        if self._claim(batch):
            self._store.commit()
            self._have(batch)
        else:
            self._store.roll_back()
            self._next_write = 0.0

    def _claim(self, batch: list[Entry]) -> bool:
        """Whether they may be committed: none was withdrawn, and none can be from now on."""
        with self._changed:
            if any(entry.withdrawn for entry in batch):
                return False
            for entry in batch:
                entry.committing = True
            return True

    def _have(self, written: list[Entry]) -> None:
        """They are durable, and the first ones that wait."""
        with self._changed:
            for _ in written:
                self._waiting.popleft()
            if self.problem:
                _log.warning("the ledger %s is written again", self._store.path)
                self.problem = ""
        for entry in written:
            entry.tell()

    def _put_off(self, problem: str) -> None:
        self._store.gather()  # on a full disk this may make the room that lacks
        with self._changed:
            if not self.problem:
                _log.error("%s It is tried again twice a second.", problem)
            self.problem = problem
            self._next_write = time.monotonic() + _AGAIN_S
            for entry in [entry for entry in self._waiting if entry.committing]:
                entry.committing = False
                if entry.withdrawn:
                    self._waiting.remove(entry)
                    entry.tell(self._refusal())

    def _give_up(self, damage: LedgerDamaged) -> None:
        """Nothing is written any more: into a damaged file it could do more damage."""
        with self._changed:
            _log.error("%s What happens from now on is not written down.", damage)
            self._damage, self.problem = damage, str(damage)
            for entry in self._waiting:
                entry.tell(self._refusal())
            self._waiting.clear()

    def _go_on_without(self, batch: list[Entry], error: Exception) -> None:
        """One of them holds what no database takes: try each alone, and leave out the one that it is."""
        if len(batch) > 1:
            self._one_by_one = len(batch)
            return
        with self._changed, suppress(ValueError):
            self._waiting.remove(batch[0])
        if batch[0].waiter is not None:
            batch[0].tell(error)
        else:
            _log.error("%r cannot be written into the ledger", batch[0].changes, exc_info=error)


_TRY = PutNumber("tries", 0)
"""What is written when nothing is to be, to see whether it can be."""
