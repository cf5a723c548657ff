"""A client's connection to the service. Until MCP begins, each message is a line of JSON."""

from __future__ import annotations

import fcntl
import json
import math
import select
import socket
import struct
import termios
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rhapsody_mcp.model.errors import BackendUnavailable

__all__ = [
    *("HANGUP", "STARTUP_TIMEOUT_S", "ClientLeft", "ServiceConnection", "ServiceHangs", "ServiceUnavailable"),
    *("is_readable",),
]

# Imports neither mcp, pydantic nor asyncio: their import would delay the start of every client.

STARTUP_TIMEOUT_S = 45.0
"""How long a service may take to be ready; MCP clients wait about 60 s for the first reply."""
HANGUP = getattr(select, "POLLRDHUP", 0)
_MAX_LINE_BYTES = 1 << 20


class ServiceUnavailable(BackendUnavailable):
    """The service cannot be started or reached, or has another version."""

    code = "service_unavailable"


class ServiceHangs(ServiceUnavailable):
    """The service neither starts nor ends, and does not answer on `connection`. `pid` is None if the system does not
    give it."""

    def __init__(self, connection: ServiceConnection, pid: int | None, message: str) -> None:
        super().__init__(message)
        self.connection, self.pid = connection, pid


class ClientLeft(Exception):
    """The MCP client on stdin has closed its end, and all that it sent has been read."""


class ServiceConnection:
    """With `client_fd`, a descriptor, every wait ends with ClientLeft when the client closes its end of it."""

    def __init__(self, connected: socket.socket, client_fd: int | None) -> None:
        self.socket = connected
        self._client_fd = client_fd
        self._buffer = b""

    def request(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send the message and return the reply, or None if the service closed the connection. Raises
        ServiceUnavailable if no reply comes."""
        self.send(message)
        return self.receive()

    def send(self, message: Mapping[str, Any]) -> None:
        """Does nothing if the service has closed the connection: `receive` tells."""
        with suppress(ConnectionError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float = STARTUP_TIMEOUT_S) -> dict[str, Any] | None:
        """The next message; returns and raises as `request` does."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if len(self._buffer) > _MAX_LINE_BYTES or not is_readable(self.socket.fileno(), self._client_fd, deadline):
                raise ServiceUnavailable(f"the service does not answer within {timeout_s:.0f} s.")
            if not (data := self._read()):
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def wait_for_close(self, timeout_s: float = STARTUP_TIMEOUT_S) -> bool:
        """Whether the service closes the connection within this time."""
        deadline = time.monotonic() + timeout_s
        while is_readable(self.socket.fileno(), self._client_fd, deadline):
            if not self._read():
                return True
        return False

    def _read(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except ConnectionError:
            return b""


def is_readable(source: int, client_fd: int | None, deadline: float) -> bool:
    """Whether `source` has data or is at its end before `deadline` (of the monotonic clock). Raises ClientLeft."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    if client_fd is not None:
        poll.register(client_fd, HANGUP)
    while (left_s := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(None if left_s == math.inf else left_s * 1000))
        if source in ready:
            return True
        if client_fd is not None and client_fd in ready:
            if _is_drained(client_fd):
                raise ClientLeft
            poll.unregister(client_fd)  # what the client sent before it left is still to be forwarded
    return False


def _is_drained(client_fd: int) -> bool:
    """Whether nothing is left to read from a descriptor whose other end is closed."""
    try:
        (unread,) = struct.unpack("i", fcntl.ioctl(client_fd, termios.FIONREAD, bytes(4)))
    except OSError:
        return True
    return not unread
