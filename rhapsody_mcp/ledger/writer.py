"""A thread that writes changes in batches, and runs queries between the batches."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from rhapsody_mcp.ledger.records import Change, PutNumber
from rhapsody_mcp.ledger.store import Store
from rhapsody_mcp.ledger.worker_thread import BATCH_S, MAX_BATCH, RETRY_S, ThreadFuture, WorkerThread
from rhapsody_mcp.ledger.write_queue import QueuedCall, QueuedWrite
from rhapsody_mcp.model.errors import LedgerDamaged, LedgerError, LedgerUnavailable

__all__ = ["MAX_QUEUED", "Writer"]

T = TypeVar("T")

MAX_QUEUED = 100_000
"""With a longer queue of writes, `commit` raises at once."""
_log = logging.getLogger(__name__)


class Writer(WorkerThread):
    """Writes changes in their order: at once if the writer is idle or a caller waits, else in batches of BATCH_S and at
    most MAX_BATCH."""

    def __init__(self, store: Store) -> None:
        super().__init__("ledger")
        self._store = store
        self._damage: LedgerDamaged | None = None
        self._writes: deque[QueuedWrite] = deque()
        self._calls: deque[QueuedCall] = deque()
        self._last_number = 0
        self._single_writes = 0
        self._next_write = 0.0

    # --- from the event loop

    def put(self, changes: tuple[Change, ...]) -> None:
        """Does not block. Drops the changes if the file is damaged or the writer has stopped."""
        self._put(changes, None)

    async def commit(self, changes: tuple[Change, ...], timeout_s: float) -> None:
        """Returns when the changes are durable. Raises LedgerUnavailable and LedgerDamaged, with the changes withdrawn.

        If their commit has begun when the time is over, waits for the end of the commit.
        """
        if changes and len(self._writes) > MAX_QUEUED:
            raise self._too_late(f"{len(self._writes):,} changes wait to be written")
        done = ThreadFuture()
        write = self._put(changes, done)
        try:
            await asyncio.wait({done.future}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._withdraw(write)
            done.future.cancel()
            raise
        if not done.future.done() and self._withdraw(write):
            done.future.cancel()
            raise self._too_late(f"it took longer than {timeout_s:g} s")
        await done.future

    async def run(self, function: Callable[[Store], T]) -> T:
        """Call the function in the thread, after the writes that were queued before it, and return its result. Writes
        that fail now do not delay the call."""
        done = ThreadFuture()
        with self.changed:
            if self.stopping:
                raise self._write_error()
            self._calls.append(QueuedCall(self._last_number, function, done))
            self._wake()
        result: T = await done.future
        return result

    @property
    def pending(self) -> int:
        """The number of changes in the queue."""
        return sum(len(write.changes) for write in self._writes)

    def _put(self, changes: tuple[Change, ...], done: ThreadFuture | None) -> QueuedWrite:
        with self.changed:
            self._last_number += 1
            write = QueuedWrite(self._last_number, changes, done)
            if self._damage is not None or self.stopping:
                self._drop(write)
                return write
            self._writes.append(write)
            if done is not None:
                self._wake()
            elif len(self._writes) in (1, MAX_BATCH):
                self.changed.notify()
        return write

    def _drop(self, write: QueuedWrite) -> None:
        write.resolve(self._write_error())
        if self.stopping and write.done is None:
            _log.error("%r came after the ledger was closed", write.changes)

    def _wake(self) -> None:
        if not self.problem:
            self._next_write = 0.0
        self.changed.notify()

    def _withdraw(self, write: QueuedWrite) -> bool:
        """Whether the write is withdrawn; False once its commit has begun."""
        with self.changed:
            write.withdrawn = True
            if write.committing:
                return False
            with suppress(ValueError):
                self._writes.remove(write)
            return True

    def _too_late(self, why: str) -> LedgerUnavailable:
        too_slow = f"the ledger {self._store.path} cannot be written fast enough: {why}. Try again later."
        return LedgerUnavailable(self.problem or too_slow)

    def _write_error(self) -> LedgerError:
        if self._damage is not None:
            return LedgerDamaged(str(self._damage))
        return LedgerUnavailable(self.problem or f"the ledger {self._store.path} is closed.")

    # --- in the thread

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                if self._is_due():
                    self._write_batch()
                if (call := self._next_call()) is not None:
                    self._calls.popleft()
                    self._run_call(call)
        finally:
            self._finish()

    def _wait_for_work(self) -> bool:
        with self.changed:
            while not (self.stopping or self._is_due() or self._next_call()):
                self.changed.wait(self._next_write - time.monotonic() if self._has_work else None)
            return not self.stopping

    def _is_due(self) -> bool:
        full = not self.problem and len(self._writes) >= MAX_BATCH
        return self._has_work and (full or time.monotonic() >= self._next_write)

    @property
    def _has_work(self) -> bool:
        """True also for an empty queue during a problem: only another try shows that the problem is over."""
        return bool(self._writes or (self.problem and self._damage is None))

    def _next_call(self) -> QueuedCall | None:
        call = self._calls[0] if self._calls else None
        ready = call is not None and (self.problem or not self._writes or self._writes[0].number > call.after)
        return call if ready else None

    def _run_call(self, call: QueuedCall) -> None:
        try:
            result = call.function(self._store)
        except LedgerDamaged as error:
            self._stop_writing(error)
            call.result.resolve(error=error)
        except Exception as error:
            call.result.resolve(error=error)
        else:
            call.result.resolve(result)

    def _finish(self) -> None:
        if self._damage is None:
            self.problem = ""
        while self._writes and not self.problem:
            self._write_batch()
        with self.changed:
            self.stopping = True
            for write in self._writes:
                write.resolve(self._write_error())
            for call in self._calls:
                call.result.resolve(error=self._write_error())
        self._store.close()

    def _write_batch(self) -> None:
        batch = self._next_batch()
        try:
            self._write(batch)
        except LedgerUnavailable as error:
            self._retry_later(str(error))
        except LedgerDamaged as error:
            self._stop_writing(error)
        except Exception as error:
            self._isolate_failure(batch, error)

    def _next_batch(self) -> list[QueuedWrite]:
        with self.changed:
            batch = list(itertools.islice(self._writes, 1 if self._single_writes else MAX_BATCH))
            self._single_writes = max(0, self._single_writes - 1)
            self._next_write = time.monotonic() + BATCH_S if len(batch) == len(self._writes) else 0.0
        return batch

    def _write(self, batch: list[QueuedWrite]) -> None:
        changes = [change for write in batch for change in write.changes]
        self._store.begin(changes or [_PROBE])
        if self._claim(batch):
            self._store.commit()
            self._finish_batch(batch)
        else:
            self._store.roll_back()
            self._next_write = 0.0

    def _claim(self, batch: list[QueuedWrite]) -> bool:
        """Mark the batch as committing, unless one of its writes was withdrawn; True if marked."""
        with self.changed:
            if any(write.withdrawn for write in batch):
                return False
            for write in batch:
                write.committing = True
            return True

    def _finish_batch(self, written: list[QueuedWrite]) -> None:
        """Remove durable writes from the front of the queue and answer their callers."""
        with self.changed:
            for _ in written:
                self._writes.popleft()
            if self.problem:
                _log.warning("the ledger %s is written again", self._store.path)
                self.problem = ""
        for write in written:
            write.resolve()

    def _retry_later(self, problem: str) -> None:
        self._store.checkpoint()  # may free space on a full disk
        with self.changed:
            if not self.problem:
                _log.error("%s It is tried again twice a second.", problem)
            self.problem = problem
            self._next_write = time.monotonic() + RETRY_S
            for write in [write for write in self._writes if write.committing]:
                write.committing = False
                if write.withdrawn:
                    self._writes.remove(write)
                    write.resolve(self._write_error())

    def _stop_writing(self, damage: LedgerDamaged) -> None:
        """Write nothing any more, because a write into a damaged file could add damage."""
        with self.changed:
            _log.error("%s What happens from now on is not written down.", damage)
            self._damage, self.problem = damage, str(damage)
            for write in self._writes:
                write.resolve(self._write_error())
            self._writes.clear()

    def _isolate_failure(self, batch: list[QueuedWrite], error: Exception) -> None:
        """One write holds a value that no database takes: try each write alone, and drop that one."""
        if len(batch) > 1:
            self._single_writes = len(batch)
            return
        with self.changed, suppress(ValueError):
            self._writes.remove(batch[0])
        if batch[0].done is not None:
            batch[0].resolve(error)
        else:
            _log.error("%r cannot be written into the ledger", batch[0].changes, exc_info=error)


_PROBE = PutNumber("tries", 0)
"""A change that is written to find out whether a problem is over."""
