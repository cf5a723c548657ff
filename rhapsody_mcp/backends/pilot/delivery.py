"""Delivers numbered messages over connections that may be lost, each message once and in order."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from rhapsody_mcp.backends.pilot.messages import Ack, Body, Hello, Numbered
from rhapsody_mcp.engine.network.multiplexer import Multiplexer
from rhapsody_mcp.engine.transport import Frames, frame

__all__ = ["Delivery"]

_KEEPALIVE_S = 10.0
_SILENCE_S = 45.0
"""How long a connection without a message counts, in seconds: the kernel takes a quarter of an hour to see that the
other end has lost its power."""

Received = TypeVar("Received")


class Delivery(Generic[Received]):
    """One end of a conversation that goes on over one connection after the other.

    `receive` gets each message of the other end once, with its number. The message counts as delivered when `settle`
    is called with that number or a later one; until then the other end keeps it. `on_delivered` gets each message of
    this end that the other end has settled. `on_hello` is called when both ends have said hello, and before that
    `on_new_life` where the other end is another process than before.
    """

    def __init__(
        self,
        receive: Callable[[Received, int], None],
        *,
        on_hello: Callable[[], None] = lambda: None,
        on_new_life: Callable[[], None] = lambda: None,
        on_delivered: Callable[[Body], None] = lambda _: None,
    ) -> None:
        self._receive, self._on_hello, self._on_new_life = receive, on_hello, on_new_life
        self._on_delivered = on_delivered
        self._life = os.urandom(8).hex()
        self._other_life, self._received, self._settled = "", 0, 0
        self._sent = self._written = 0
        self._unacknowledged: deque[Numbered] = deque()
        self._connection: Multiplexer | None = None
        self.acknowledged = asyncio.Event()
        """Set once nothing is unacknowledged, and where the connection is lost."""
        self.connected = asyncio.Event()
        """Set while both ends have said hello on the present connection."""
        self._frames: Frames[Hello | Ack | Numbered] = Frames(Hello | Ack | Numbered)

    @property
    def unacknowledged(self) -> list[Body]:
        """The messages that the other end may not have, in order."""
        return [numbered.body for numbered in self._unacknowledged]

    @property
    def is_connected(self) -> bool:
        return self.connected.is_set()

    @property
    def unwritten(self) -> list[Body]:
        """The messages that the other end certainly does not have: they were written to no connection."""
        return [numbered.body for numbered in self._unacknowledged if numbered.number > self._written]

    def send(self, body: Body) -> None:
        """Send a message now, or on the next connection."""
        self._sent += 1
        numbered = Numbered(self._sent, body)
        self._unacknowledged.append(numbered)
        self.acknowledged.clear()
        if self.is_connected:
            self._write_numbered(numbered)

    def settle(self, number: int) -> None:
        """Acknowledge all messages up to this number."""
        self._settled = max(self._settled, number)
        if self.is_connected:
            self._write(Ack(self._settled))

    def connect(self, connection: Multiplexer) -> None:
        """Go on over this connection, in place of the one before."""
        if self._connection is not None:
            self._connection.control.user = None  # its end says nothing of the new one
            self._connection.abort()
        self._connection = connection
        self.connected.clear()
        self._frames = Frames(Hello | Ack | Numbered)
        connection.control.user = self
        self._write(Hello(self._life, self._other_life, self._settled))

    async def keep_alive(self) -> None:
        """Have the other end hear something often, and abort a connection on which nothing comes. Never returns."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_KEEPALIVE_S)
            self.settle(0)
            if (connection := self._connection) is not None and loop.time() - connection.last_received > _SILENCE_S:
                connection.abort()

    def _write_numbered(self, numbered: Numbered) -> None:
        self._written = max(self._written, numbered.number)
        self._write(numbered)

    def _write(self, message: object) -> None:
        if self._connection is not None:
            self._connection.control.write(frame([message]))

    def stream_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            match message:
                case Hello():
                    self._say_hello(message)
                case Ack():
                    self._forget(message.number)
                case Numbered() if message.number > self._received:
                    self._received = message.number
                    self._receive(cast(Received, message.body), message.number)

    def _say_hello(self, hello: Hello) -> None:
        if hello.life != self._other_life:  # another process, which counts from 1 again
            if self._other_life:
                self._on_new_life()
            self._other_life, self._received, self._settled = hello.life, 0, 0
        if hello.of == self._life:
            self._forget(hello.received)
        self.connected.set()
        for numbered in self._unacknowledged:
            self._write_numbered(numbered)
        self._on_hello()

    def drop_unacknowledged(self) -> None:
        """Send no message again that was meant for the process before."""
        self._unacknowledged.clear()
        self.acknowledged.set()

    def _forget(self, number: int) -> None:
        while self._unacknowledged and self._unacknowledged[0].number <= number:
            self._on_delivered(self._unacknowledged.popleft().body)
        if not self._unacknowledged:
            self.acknowledged.set()

    def stream_ended(self) -> None:
        self.connected.clear()
        self.acknowledged.set()
