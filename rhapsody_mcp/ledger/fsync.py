"""A thread that sees result files to the disk, so that no one who writes into the ledger waits for a large one."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from rhapsody_mcp.ledger.write_queue import Waiter

__all__ = ["Syncer"]

_MOST_AT_ONCE = 1000
_GATHER_S = 0.02
_AGAIN_S = 0.5
_AGAIN_LATER = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
_log = logging.getLogger(__name__)


class _Item(NamedTuple):
    files: Sequence[str]
    then: Callable[[], None]


class Syncer:
    """Does what is to be done once files are on the disk, in the order in which it was put.

    `problem` is empty, or says why files cannot be seen to the disk now; it is tried again twice a second.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._spoiled: set[str] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="ledger's files", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, files: Sequence[str], then: Callable[[], None]) -> None:
        """Never waits. `then` runs in the thread; files that are not there are left out."""
        with self._changed:
            if not self._stopping:
                self._waiting.append(_Item(files, then))
                self._changed.notify()
                return
        then()

    async def done(self, files: Sequence[str], within_s: float) -> bool:
        """Whether these, and all that were put before, were on the disk in that time."""
        waiter = Waiter()
        self.put(files, waiter.tell)
        await asyncio.wait({waiter.future}, timeout=within_s)
        return waiter.future.done()

    async def stop(self, within_s: float) -> bool:
        """Do what is left, or try to once more. False where a disk that does not answer keeps that from ending."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, within_s)
        return not self._thread.is_alive()

    @property
    def left(self) -> int:
        """How many wait for their files."""
        return len(self._waiting)

    # --- in the thread

    def _work(self) -> None:
        while items := self._next():
            last_try = self._stopping
            try:
                done = self._see_to_disk(items)
            except OSError as error:
                self._put_off(error)
                if last_try:
                    return
            else:
                self.problem = ""
                for _ in range(done):
                    self._waiting.popleft().then()

    def _next(self) -> list[_Item]:
        """None are left where it is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return list(itertools.islice(self._waiting, _MOST_AT_ONCE))

    def _see_to_disk(self, items: list[_Item]) -> int:
        """How many of the first of them have their files on the disk now: as many as can be in 20 ms, at least one."""
        deadline = time.monotonic() + _GATHER_S
        folders: set[str] = set()
        done = 0
        while done < len(items) and (not done or time.monotonic() < deadline):
            for file in items[done].files:
                self._see_file_to_disk(file)
                folders.add(os.path.dirname(file))
            done += 1
        for folder in folders:
            _see_to_disk(folder, _sync)
        return done

    def _see_file_to_disk(self, file: str) -> None:
        again = file in self._spoiled
        self._spoiled.add(file)
        _see_to_disk(file, _write_anew if again else _sync)
        self._spoiled.discard(file)

    def _put_off(self, error: OSError) -> None:
        if not self.problem:
            _log.error("results cannot be seen to the disk: %s. It is tried again twice a second.", error)
        self.problem = f"results cannot be seen to the disk: {error.filename}: {error.strerror}."
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, _AGAIN_S)


def _see_to_disk(path: str, how: Callable[[str], None]) -> None:
    """Raises OSError where another time it may work; what is not there is left out."""
    try:
        how(path)
    except OSError as error:
        if error.errno in _AGAIN_LATER:
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        _log.warning("what is in %s may not outlive a power cut: %s", path, error)


def _sync(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_anew(path: str) -> None:
    """Once fsync has failed the system takes for written what is not, and the next fsync says that all is well."""
    copy = f"{path}.anew"
    try:
        shutil.copy(path, copy)
        _sync(copy)
        os.replace(copy, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(copy)
