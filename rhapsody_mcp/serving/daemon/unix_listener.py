"""The socket at which a service is called, and the lock that makes it the only one."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from rhapsody_mcp.model.errors import InvalidSettings, RhapsodyError
from rhapsody_mcp.serving.paths import Places

__all__ = ["Door", "Taken"]

_BACKLOG = 1024
State = Literal["starts", "serves", "ends"]


class Taken(RhapsodyError):
    """Another service has the lock: it is there, it starts, or it ends."""


class Door:
    """Open within `with`. Of two services that open it at once one does, and the other raises Taken."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.listener: socket.socket

    def __enter__(self) -> Self:
        """Raises InvalidSettings where the folders or the socket cannot be made, or are not ours alone."""
        self.places.make()
        try:
            self._lock = _locked(self.places.lock)
            self.say("starts")
            self.listener, self._made = _listening(self.places.socket)
        except OSError as error:
            raise InvalidSettings(
                f"the socket {self.places.socket} cannot be made: {error.strerror or error}. Name another --folder."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody finds the socket any more once the lock is free."""
        if _is_at(self.places.socket, self._made):
            self.places.socket.unlink()
        self.listener.close()
        os.close(self._lock)

    def say(self, state: State) -> None:
        """Let those know who wait for an answer: one that starts or ends takes its time, one that serves does not."""
        self._state: State = state
        told = json.dumps({"pid": os.getpid(), "state": state}).encode()
        with suppress(OSError):  # a full disk; then it counts as one that serves
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, told, 0)

    def repair(self) -> socket.socket | None:
        """Where the socket or the lock is gone or has been replaced, make it again, and give the listener that nobody
        finds any more. Raises OSError and RhapsodyError, with nothing changed, where that cannot be done now."""
        locked = _is_at(self.places.lock, os.fstat(self._lock))
        if locked and _is_at(self.places.socket, self._made):
            return None
        self.places.make()
        if not locked:
            old, self._lock = self._lock, _locked(self.places.lock)
            os.close(old)
            self.say(self._state)
        gone = self.listener
        self.listener, self._made = _listening(self.places.socket)
        return gone


def _locked(file: Path) -> int:
    """A descriptor of the file, locked for as long as it is open; children do not inherit it."""
    lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Taken("another service runs here.") from None
    return lock


def _listening(path: Path) -> tuple[socket.socket, os.stat_result]:
    """What is at the path is replaced in one step: whoever finds the socket is heard."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    opened = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        opened.bind(str(draft))
        opened.listen(_BACKLOG)
        opened.setblocking(False)
        made = draft.stat()
        draft.rename(path)
    except OSError:
        opened.close()
        raise
    finally:
        os.umask(before)
    return opened, made


def _is_at(path: Path, made: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), made)
    except OSError:
        return False
