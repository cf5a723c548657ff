"""Copies bytes between an MCP client on stdin and stdout and the service, which lives on when the client leaves."""

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
from rhapsody_mcp.serving.daemon.client import Caller
from rhapsody_mcp.serving.daemon.connection import HANGUP, ClientLeft

__all__ = ["run_bridge"]

_LEAVING_S = 0.7
"""How long answers are awaited once the client has left; MCP clients give 2 s before they use force."""
_READ, _WRITTEN = 1 << 16, 4096
"""Bytes at once; a pipe that is ready takes as many as are written without a wait."""
_INTERNAL_ERROR = -32603


def run_bridge(caller: Caller, offer: dict[str, Any]) -> int:
    """Returns the exit code: 0 within 1 s of the end of stdin, 1 where the service cannot be had or goes away."""
    try:
        line, answer = caller.join(**{"as": "mcp", "offer": offer})
    except ClientLeft:
        return 0
    except RhapsodyError as error:
        _say(str(error))
        _refuse_all(str(error))
        return 1
    for note in answer["notes"]:
        _say(note)
    if _Bridge(line.socket).run():
        return 0
    _say(
        "the service went away: it was stopped, or it was killed. What its ledger holds is there again when a client "
        f"connects. Its log is {caller.places.log}."
    )
    return 1


def _say(words: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"rhapsody-mcp: {words}\n")
        sys.stderr.flush()


def _refuse_all(words: str) -> None:
    """Answer each request with what is wrong, until the client leaves: most show no more of a server than that."""
    if sys.stdin is None or sys.stdin.isatty():
        return
    for line in sys.stdin.buffer:
        with suppress(ValueError, OSError):
            message = json.loads(line)
            if isinstance(message, dict) and "method" in message and "id" in message:
                error = {"code": _INTERNAL_ERROR, "message": words}
                answer = {"jsonrpc": "2.0", "id": message["id"], "error": error}
                os.write(1, json.dumps(answer).encode() + b"\n")


class _Flow:
    """Bytes on their way from one descriptor to another; no more are read before the last are written."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.left = memoryview(b"")
        self.ended = False
        """Nothing more can be read, or nobody takes it."""

    @property
    def next(self) -> tuple[int, int]:
        """What `move` waits for: a descriptor, and what it must be ready for."""
        return (self.sink, select.POLLOUT) if self.left else (self.source, 0 if self.ended else select.POLLIN)

    def is_in(self, ready: Container[int]) -> bool:
        descriptor, event = self.next
        return bool(event) and descriptor in ready

    def move(self) -> None:
        """Read or write, whichever is next. Raises BrokenPipeError where nobody takes what is written."""
        with suppress(BlockingIOError):
            if self.left:
                self.left = self.left[os.write(self.sink, self.left[:_WRITTEN]) :]
            else:
                self.left = memoryview(self._read())
                self.ended = not self.left

    def _read(self) -> bytes:
        try:
            return os.read(self.source, _READ)
        except ConnectionResetError:
            return b""

    def give_up(self) -> None:
        self.left, self.ended = memoryview(b""), True


class _Bridge:
    def __init__(self, service: socket.socket) -> None:
        service.setblocking(False)
        self._service = service
        self._out, self._back = _Flow(0, service.fileno()), _Flow(service.fileno(), 1)
        self._leaves_by: float | None = None

    def run(self) -> bool:
        """Whether it was the client who left."""
        try:
            while not self._back.ended and self._has_time():
                self._turn()
        except BrokenPipeError:
            return True
        return self._leaves_by is not None

    def _has_time(self) -> bool:
        return self._leaves_by is None or time.monotonic() < self._leaves_by

    def _turn(self) -> None:
        ready = self._ready()
        if self._out.is_in(ready):
            self._send()
        if self._back.is_in(ready):
            self._back.move()
        if ready.get(0, 0) & (HANGUP | select.POLLHUP):
            self._leave()

    def _send(self) -> None:
        try:
            self._out.move()
        except BrokenPipeError:
            self._out.give_up()  # the service is gone; what it said before is still read
            return
        if self._out.ended:
            self._leave()
            with suppress(OSError):
                self._service.shutdown(socket.SHUT_WR)

    def _leave(self) -> None:
        """The client has closed its end; what it sent before is on its way, and so may answers be."""
        self._leaves_by = self._leaves_by or time.monotonic() + _LEAVING_S

    def _ready(self) -> dict[int, int]:
        """What can be read or written now, and on descriptor 0 whether the client has left."""
        wanted = {} if self._leaves_by else {0: HANGUP}
        for descriptor, event in (self._out.next, self._back.next):
            if event:
                wanted[descriptor] = wanted.get(descriptor, 0) | event
        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        return dict(poll.poll(self._leaves_by and max(0.0, self._leaves_by - time.monotonic()) * 1000))
