"""A connection to the service, on which a message is a line of JSON until the protocol begins."""

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

__all__ = ["PATIENCE_S", "ClientLeft", "Line", "ServiceHangs", "ServiceUnavailable", "has_left", "is_readable"]

# Neither mcp, pydantic nor asyncio is imported here: whoever starts a client waits for it.

PATIENCE_S = 45.0
"""How long a service may take to be ready; MCP clients wait about 60 s for a first answer."""
HANGUP = getattr(select, "POLLRDHUP", 0)
_LONGEST_LINE = 1 << 20


class ServiceUnavailable(BackendUnavailable):
    """The service cannot be started or reached, or is of another version."""


class ServiceHangs(ServiceUnavailable):
    """The service does not answer, though it neither starts nor ends. `line` leads to it; `pid` is None where the
    system does not tell it."""

    def __init__(self, line: Line, pid: int | None, words: str) -> None:
        super().__init__(words)
        self.line, self.pid = line, pid


class ClientLeft(Exception):
    """The client on whose behalf this is done has closed its end, and nothing that it sent is left."""


class Line:
    """`client` is a descriptor; what is waited for is given up, with ClientLeft, when its other end is closed."""

    def __init__(self, opened: socket.socket, client: int | None) -> None:
        self.socket = opened
        self._client = client
        self._heard = b""

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; None where the service ended instead. Raises ServiceUnavailable where none comes."""
        self.tell(message)
        return self.hear()

    def tell(self, message: Mapping[str, Any]) -> None:
        with suppress(ConnectionError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, within_s: float = PATIENCE_S) -> dict[str, Any] | None:
        """As `ask`."""
        until = time.monotonic() + within_s
        while b"\n" not in self._heard:
            if len(self._heard) > _LONGEST_LINE or not is_readable(self.socket.fileno(), self._client, until):
                raise ServiceUnavailable(f"the service does not answer within {within_s:.0f} s.")
            if not (more := self._receive()):
                return None
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def wait_for_end(self, within_s: float = PATIENCE_S) -> bool:
        """Whether the other end is closed in this time."""
        until = time.monotonic() + within_s
        while is_readable(self.socket.fileno(), self._client, until):
            if not self._receive():
                return True
        return False

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except ConnectionError:
            return b""


def is_readable(source: int, client: int | None, until: float) -> bool:
    """Whether there is something to read, or its end, before `until` of the monotonic clock. Raises ClientLeft."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    if client is not None:
        poll.register(client, HANGUP)
    while (left := until - time.monotonic()) > 0:
        ready = dict(poll.poll(None if left == math.inf else left * 1000))
        if source in ready:
            return True
        if client is not None and client in ready:
            if has_left(client):
                raise ClientLeft
            poll.unregister(client)  # what it sent before it left is still to be done
    return False


def has_left(client: int) -> bool:
    """Of one whose end is closed: whether everything that it sent has been read."""
    try:
        (left,) = struct.unpack("i", fcntl.ioctl(client, termios.FIONREAD, bytes(4)))
    except OSError:
        return True
    return not left
