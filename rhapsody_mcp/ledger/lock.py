"""One process at a time: a lock file that says who holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import msgspec

from rhapsody_mcp.model.errors import LedgerInUse

__all__ = ["Holder", "Lock", "holder", "start_time"]

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # of file systems without flock


class Holder(msgspec.Struct, frozen=True):
    """A process that holds a lock. `started` is when the process was (field 22 of /proc/PID/stat), `since` when it
    took the lock (seconds since the epoch)."""

    host: str
    pid: int
    started: int
    since: float

    @property
    def alive(self) -> bool:
        """Whether that very process lives on this host: not another one that has got its pid since then."""
        return self.host == socket.gethostname() and self.started > 0 and start_time(self.pid) == self.started


class Lock:
    """The kernel takes it back from a process that ends, however it ends: what that wrote into it counts no more.
    Where the file system knows no locks (`known` is False then), what is written there counts while that process
    lives; two that take it in the same millisecond can both have it there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = True
        self._file = -1

    def take(self) -> None:
        """Raises LedgerInUse, which says who holds it, and OSError where there can be no such file."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._claim(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _claim(self, file: int) -> None:
        locked = self._lock(file)
        there = holder(self.path)
        if there is None or not there.alive:
            there = Holder("", 0, 0, 0.0)
        if not locked or there.pid not in (0, os.getpid()):
            raise LedgerInUse(str(self.path.parent), there.host, there.pid, there.since)
        _write(file, Holder(socket.gethostname(), os.getpid(), start_time(os.getpid()), time.time()))

    def _lock(self, file: int) -> bool:
        """False where another process has it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.known = False
        return True

    def give_back(self) -> None:
        """Another process can take it from now on. A second call does nothing."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def holder(path: Path) -> Holder | None:
    """Who wrote into a lock file that it holds it; it need not live any more. Takes no lock."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    except (OSError, msgspec.DecodeError):
        return None


def start_time(pid: int) -> int:
    """When a process was started, in ticks since the machine was; 0 where no such process lives, or no /proc is."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def _write(file: int, facts: Holder) -> None:
    """On a full disk there may be no room for it; the lock holds nevertheless."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, msgspec.json.encode(facts) + b"\n", 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
