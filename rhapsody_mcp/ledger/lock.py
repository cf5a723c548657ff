"""A lock file that names its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import msgspec

from rhapsody_mcp.engine.process.tree import started_at
from rhapsody_mcp.model.errors import LedgerInUse

__all__ = ["Lock", "LockHolder", "read_holder"]

_UNSUPPORTED_ERRORS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # on file systems without flock


class LockHolder(msgspec.Struct, frozen=True):
    """A process that holds a lock. `started` is its start time (field 22 of /proc/PID/stat), `since` the time at which
    it acquired the lock (seconds since the epoch)."""

    host: str
    pid: int
    started: int
    since: float

    @property
    def alive(self) -> bool:
        """Whether the process lives on this host; another process with the same pid does not count."""
        return self.host == socket.gethostname() and self.started > 0 and started_at(self.pid) == self.started


class Lock:
    """The kernel releases the lock of a process that ends. On a file system without locks, `is_supported` becomes
    False, and the holder in the file counts while its process lives; two processes that acquire the lock in the same
    millisecond can then both have it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_supported = True
        self._file = -1

    def acquire(self) -> None:
        """Raises LedgerInUse, which names the holder, and OSError where the file cannot be made."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._claim(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _claim(self, file: int) -> None:
        locked = self._flock(file)
        other = read_holder(self.path)
        if other is None or not other.alive:
            other = LockHolder("", 0, 0, 0.0)
        if not locked or other.pid not in (0, os.getpid()):
            raise LedgerInUse(str(self.path.parent), other.host, other.pid, other.since)
        _write_holder(file, LockHolder(socket.gethostname(), os.getpid(), started_at(os.getpid()), time.time()))

    def _flock(self, file: int) -> bool:
        """False where another process has the lock."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED_ERRORS:
                raise
            self.is_supported = False
        return True

    def release(self) -> None:
        """A second call does nothing."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def read_holder(path: Path) -> LockHolder | None:
    """The holder that a lock file names, which may have ended. Takes no lock."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=LockHolder)
    except (OSError, msgspec.DecodeError):
        return None


def _write_holder(file: int, holder: LockHolder) -> None:
    """A full disk is ignored: the lock is held without the text."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, msgspec.json.encode(holder) + b"\n", 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
