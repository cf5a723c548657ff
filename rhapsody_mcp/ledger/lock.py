"""A lock file that names its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.engine.process.tree import started_at
from rhapsody_mcp.model.errors import LedgerInUse

__all__ = ["Lock", "LockHolder", "read_holder"]

_UNSUPPORTED_ERRORS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # on file systems without flock
_OTHER_HOST_S = 10.0
"""How long a holder on another host is watched for a heartbeat; the service of this package has one each second."""
_LOOK_S = 0.2


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
    millisecond can then both have it.

    Some file systems of clusters keep locks on each host by itself. A holder on another host therefore counts while
    `beat` is called there; a holder that was killed there is waited for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_supported = True
        self._file = -1
        self._holder: LockHolder | None = None

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
        if other is not None and (not locked or self._holds(other)):
            raise LedgerInUse(str(self.path.parent), other.host, other.pid, other.since)
        if not locked:
            raise LedgerInUse(str(self.path.parent), "", 0, 0.0)
        holder = LockHolder(socket.gethostname(), os.getpid(), started_at(os.getpid()), time.time())
        self._holder = holder if _write_holder(file, holder) else None

    def _holds(self, other: LockHolder) -> bool:
        """Whether the holder that the file names has the lock, although this process could lock the file."""
        if other.host == socket.gethostname():
            return other.alive and other.pid != os.getpid()
        last_beat, deadline = self._last_beat(), time.monotonic() + _OTHER_HOST_S
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            if self._last_beat() != last_beat:
                return read_holder(self.path) is not None
        return False

    def _last_beat(self) -> int:
        """The time of the last change of the file; opening it has a network file system ask its server."""
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def beat(self) -> bool:
        """Let other hosts see that this process lives. Return whether it still holds the lock: False means that another
        host took this process for dead, as after a suspension."""
        if self._file < 0:
            return True
        with suppress(OSError):
            os.utime(self._file)
        return self._names_this_process()

    def _names_this_process(self) -> bool:
        """Whether the file is as this process wrote it; also where it could not be written, or was deleted."""
        try:
            return self._holder is None or self.path.read_bytes() == _line_of(self._holder)
        except OSError:
            return True

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
            if self._names_this_process():
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def read_holder(path: Path) -> LockHolder | None:
    """The holder that a lock file names, which may have ended. Takes no lock."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=LockHolder)
    except (OSError, msgspec.DecodeError):
        return None


def _line_of(holder: LockHolder) -> bytes:
    return msgspec.json.encode(holder) + b"\n"


def _write_holder(file: int, holder: LockHolder) -> bool:
    """False on a full disk: the lock is held without the text."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, _line_of(holder), 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True
