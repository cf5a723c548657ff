"""A thread that calls fsync on result files, so that writes of small changes do not wait for large files."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from rhapsody_mcp.ledger.worker_thread import BATCH_S, MAX_BATCH, RETRY_S, ThreadFuture, WorkerThread

__all__ = ["FsyncThread"]

_RETRIED_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
_log = logging.getLogger(__name__)


class _Request(NamedTuple):
    files: Sequence[str]
    callback: Callable[[], None]


class FsyncThread(WorkerThread):
    """Calls each request's callback once the request's files are on the disk, in the order of the requests."""

    def __init__(self) -> None:
        super().__init__("ledger's files")
        self._queue: deque[_Request] = deque()
        self._failed_files: set[str] = set()

    def put(self, files: Sequence[str], callback: Callable[[], None]) -> None:
        """Does not block. The callback runs in the thread; missing files are ignored."""
        with self.changed:
            if not self.stopping:
                self._queue.append(_Request(files, callback))
                self.changed.notify()
                return
        callback()

    async def sync(self, files: Sequence[str], timeout_s: float) -> bool:
        """Whether these files, and those of all earlier requests, reached the disk in this time."""
        done = ThreadFuture()
        self.put(files, done.resolve)
        await asyncio.wait({done.future}, timeout=timeout_s)
        return done.future.done()

    @property
    def pending(self) -> int:
        """The number of requests in the queue."""
        return len(self._queue)

    # --- in the thread

    def _work(self) -> None:
        while requests := self._next():
            last_try = self.stopping
            try:
                done = self._sync_batch(requests)
            except OSError as error:
                self._wait_to_retry(error)
                if last_try:
                    return
            else:
                self.problem = ""
                for _ in range(done):
                    self._queue.popleft().callback()

    def _next(self) -> list[_Request]:
        """Wait for requests; empty at the end of the thread."""
        with self.changed:
            self.changed.wait_for(lambda: self._queue or self.stopping)
            return list(itertools.islice(self._queue, MAX_BATCH))

    def _sync_batch(self, requests: list[_Request]) -> int:
        """Sync the files of the first requests, as many as BATCH_S allows, at least one. Returns their number."""
        deadline = time.monotonic() + BATCH_S
        folders: set[str] = set()
        done = 0
        while done < len(requests) and (not done or time.monotonic() < deadline):
            for file in requests[done].files:
                self._sync_file(file)
                folders.add(os.path.dirname(file))
            done += 1
        for folder in folders:
            _try_sync(folder, _fsync)
        return done

    def _sync_file(self, file: str) -> None:
        failed_before = file in self._failed_files
        self._failed_files.add(file)
        _try_sync(file, _rewrite if failed_before else _fsync)
        self._failed_files.discard(file)

    def _wait_to_retry(self, error: OSError) -> None:
        if not self.problem:
            _log.error("results cannot be seen to the disk: %s. It is tried again twice a second.", error)
        self.problem = f"results cannot be seen to the disk: {error.filename}: {error.strerror}."
        with self.changed:
            self.changed.wait_for(lambda: self.stopping, RETRY_S)


def _try_sync(path: str, sync: Callable[[str], None]) -> None:
    """Raises OSError for an error that may pass; logs every other error, also of a missing file."""
    try:
        sync(path)
    except OSError as error:
        if error.errno in _RETRIED_ERRORS:
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        _log.warning("what is in %s may not outlive a power cut: %s", path, error)


def _fsync(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _rewrite(path: str) -> None:
    """Write the file again as a copy. After a failed fsync the kernel marks lost pages as clean, so that the next fsync
    of the same file succeeds without them."""
    copy = f"{path}.anew"
    try:
        shutil.copy(path, copy)
        _fsync(copy)
        os.replace(copy, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(copy)
