"""The service's Unix socket, and the lock that allows one service for each user and host."""

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
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.serving.unix_sockets import bind_unix_socket, is_same_file

__all__ = ["AlreadyRunning", "UnixListener"]

Phase = Literal["starts", "serves", "ends"]


class AlreadyRunning(RhapsodyError):
    """Another service holds the lock: it runs, starts or ends."""

    code = "already_running"


class UnixListener:
    """Holds the lock and listens within `with`. Of two services that enter at once, one gets AlreadyRunning."""

    def __init__(self, paths: ServicePaths) -> None:
        self.paths = paths
        self.socket: socket.socket

    def __enter__(self) -> Self:
        """Raises InvalidSettings where folders or socket cannot be made, or are not private to this user."""
        self.paths.make_folders()
        try:
            self._lock = _locked(self.paths.lock)
            self.publish("starts")
            self.socket, self._socket_info = _listen(self.paths.socket)
        except OSError as error:
            raise InvalidSettings(
                f"the socket {self.paths.socket} cannot be made: {error.strerror or error}. Name another --folder."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes the socket before the lock is released."""
        if is_same_file(self.paths.socket, self._socket_info):
            self.paths.socket.unlink()
        self.socket.close()
        os.close(self._lock)

    def publish(self, phase: Phase) -> None:
        """Write the service's phase into the lock file: clients wait longer for one that starts or ends."""
        self._phase: Phase = phase
        content = json.dumps({"pid": os.getpid(), "state": phase}).encode()
        with suppress(OSError):  # on a full disk the file stays empty, which counts as "serves"
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, content, 0)

    def repair(self) -> socket.socket | None:
        """Make the socket and the lock file again where one was removed or replaced. Returns the old listening socket,
        which clients can no longer find, or None. Raises OSError and RhapsodyError, with nothing changed."""
        lock_is_there = is_same_file(self.paths.lock, os.fstat(self._lock))
        if lock_is_there and is_same_file(self.paths.socket, self._socket_info):
            return None
        self.paths.make_folders()
        if not lock_is_there:
            old_lock, self._lock = self._lock, _locked(self.paths.lock)
            os.close(old_lock)
            self.publish(self._phase)
        old_socket = self.socket
        self.socket, self._socket_info = _listen(self.paths.socket)
        return old_socket


def _locked(file: Path) -> int:
    """A descriptor of the file, which is locked until the descriptor is closed. Child processes do not inherit it."""
    lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise AlreadyRunning("another service runs here.") from None
    return lock


def _listen(path: Path) -> tuple[socket.socket, os.stat_result]:
    """A listening socket and its stat result. It replaces the file at the path in one step."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    listener = bind_unix_socket(draft)
    try:
        listener.setblocking(False)
        info = draft.stat()
        draft.rename(path)
    except OSError:
        listener.close()
        raise
    return listener, info
