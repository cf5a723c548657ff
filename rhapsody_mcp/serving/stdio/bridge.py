"""Copies bytes between an MCP client on stdin and stdout and the service, which survives the client."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Container
from contextlib import suppress
from typing import Any

from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.serving.daemon.client import ServiceClient
from rhapsody_mcp.serving.daemon.connection import HANGUP, ClientLeft

__all__ = ["run_bridge"]

_DRAIN_S = 0.7
"""How long replies are forwarded after the client has left; MCP clients kill the process after 2 s."""
_READ_BYTES, _WRITE_BYTES = 1 << 16, 4096
"""For one call. A pipe that is ready takes 4096 bytes (PIPE_BUF) without blocking."""
_INTERNAL_ERROR = -32603


def run_bridge(client: ServiceClient, settings: dict[str, Any]) -> int:
    """Returns the exit code: 0 within 1 s of the end of stdin, 1 where the service cannot be reached or ends.
    `settings` are those that a client may choose."""
    try:
        connection, reply = client.connect(**{"as": "mcp", "offer": settings})
    except ClientLeft:
        return 0
    except RhapsodyError as error:
        _warn(str(error))
        _refuse_requests(str(error))
        return 1
    for note in reply["notes"]:
        _warn(note)
    if _Bridge(connection.socket).run():
        return 0
    _warn(
        "the service went away: it was stopped, or it was killed. What its ledger holds is there again when a client "
        f"connects. Its log is {client.paths.log}."
    )
    return 1


def _warn(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"rhapsody-mcp: {text}\n")
        sys.stderr.flush()


def _refuse_requests(text: str) -> None:
    """Answer each request with an error until the client leaves: most clients show nothing else of a failed server."""
    if sys.stdin is None or sys.stdin.isatty():
        return
    for line in sys.stdin.buffer:
        with suppress(ValueError, OSError):
            message = json.loads(line)
            if isinstance(message, dict) and "method" in message and "id" in message:
                error = {"code": _INTERNAL_ERROR, "message": text}
                reply = {"jsonrpc": "2.0", "id": message["id"], "error": error}
                os.write(1, json.dumps(reply).encode() + b"\n")


class _Copier:
    """Copies bytes from one descriptor to another; reads no more before all that it read is written."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.unwritten = memoryview(b"")
        self.ended = False
        """The source is at its end, or the sink is closed."""

    @property
    def awaited(self) -> tuple[int, int]:
        """The descriptor and the poll event that `step` needs next; event 0 at the end."""
        if self.unwritten:
            return self.sink, select.POLLOUT
        return self.source, 0 if self.ended else select.POLLIN

    def can_step(self, ready: Container[int]) -> bool:
        descriptor, event = self.awaited
        return bool(event) and descriptor in ready

    def step(self) -> None:
        """Read once or write once. Raises BrokenPipeError where the sink is closed."""
        with suppress(BlockingIOError):
            if self.unwritten:
                self.unwritten = self.unwritten[os.write(self.sink, self.unwritten[:_WRITE_BYTES]) :]
            else:
                self.unwritten = memoryview(self._read())
                self.ended = not self.unwritten

    def _read(self) -> bytes:
        try:
            return os.read(self.source, _READ_BYTES)
        except ConnectionResetError:
            return b""

    def abandon(self) -> None:
        self.unwritten, self.ended = memoryview(b""), True


class _Bridge:
    def __init__(self, service: socket.socket) -> None:
        service.setblocking(False)
        self._service = service
        self._requests, self._replies = _Copier(0, service.fileno()), _Copier(service.fileno(), 1)
        self._drain_deadline: float | None = None
        """Set once the client has left."""

    def run(self) -> bool:
        """True if the client left, False if the service ended first."""
        try:
            while not self._replies.ended and self._has_time():
                self._step()
        except BrokenPipeError:
            return True
        return self._drain_deadline is not None

    def _has_time(self) -> bool:
        return self._drain_deadline is None or time.monotonic() < self._drain_deadline

    def _step(self) -> None:
        ready = self._poll()
        if self._requests.can_step(ready):
            self._forward_requests()
        if self._replies.can_step(ready):
            self._replies.step()
        if ready.get(0, 0) & (HANGUP | select.POLLHUP):
            self._start_draining()

    def _forward_requests(self) -> None:
        try:
            self._requests.step()
        except BrokenPipeError:
            self._requests.abandon()  # the service has ended; its last replies are still read
            return
        if self._requests.ended:
            self._start_draining()
            with suppress(OSError):
                self._service.shutdown(socket.SHUT_WR)

    def _start_draining(self) -> None:
        """The client has left; its last requests and their replies are still forwarded."""
        self._drain_deadline = self._drain_deadline or time.monotonic() + _DRAIN_S

    def _poll(self) -> dict[int, int]:
        """The events that occurred, by descriptor; with those of the client's hangup on descriptor 0."""
        awaited = {} if self._drain_deadline else {0: HANGUP}
        for descriptor, event in (self._requests.awaited, self._replies.awaited):
            if event:
                awaited[descriptor] = awaited.get(descriptor, 0) | event
        poll = select.poll()
        for descriptor, events in awaited.items():
            poll.register(descriptor, events)
        return dict(poll.poll(self._drain_deadline and max(0.0, self._drain_deadline - time.monotonic()) * 1000))
