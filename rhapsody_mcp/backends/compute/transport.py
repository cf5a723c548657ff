"""Connections between the backend and the processes of an engine, over a Unix socket on this machine.

The nodes of an engine with several nodes connect through `backends.compute.nodes.transport`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from rhapsody_mcp.engine.messages import ToBackend
from rhapsody_mcp.engine.transport import Frames, frame, unread_data

__all__ = ["Connection", "Receiver", "Transport", "UnixTransport"]


class Connection(Protocol):
    """A connection from one process of an engine. A node agent has one connection, a worker has two."""

    def send(self, *messages: object) -> None:
        """Send messages in this order; never blocks. Nothing happens where the other end is gone."""

    def close(self) -> None:
        """End the connection once all that was sent is on its way."""


class Receiver(Protocol):
    """Receives messages and disconnections; its methods are called in the event loop."""

    def received(self, connection: Connection, messages: Sequence[ToBackend]) -> None:
        """Take the messages of one read: at least one, in the order in which they were sent."""

    def disconnected(self, connection: Connection) -> None:
        """The other end is gone, and `received` has had each of its messages."""


class Transport(Protocol):
    async def listen(self, receiver: Receiver) -> str:
        """Accept connections; returns the address for the processes of the engine."""

    def close(self) -> None:
        """Accept no further connection, and end each open one."""


class UnixTransport:
    """Listens at a Unix socket in `folder`, which only this user can enter."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "backend")
        self._server: asyncio.Server | None = None
        self._connections: set[_UnixConnection] = set()

    async def listen(self, receiver: Receiver) -> str:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _UnixConnection(receiver, self._connections), self._path)
        return self._path

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.transport.abort()


class _UnixConnection(asyncio.Protocol):
    """One open connection; it is a member of `connections` while it is open."""

    transport: asyncio.Transport

    def __init__(self, receiver: Receiver, connections: set[_UnixConnection]) -> None:
        self._receiver, self._connections = receiver, connections
        self._frames: Frames[ToBackend] = Frames(ToBackend)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are no asyncio.Transport
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if messages := list(self._frames.feed(data)):
            self._receiver.received(self, messages)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and (rest := unread_data(self.transport.get_extra_info("socket").fileno())):
            self.data_received(rest)
        self._connections.discard(self)
        self._receiver.disconnected(self)

    def send(self, *messages: object) -> None:
        self.transport.write(frame(list(messages)))

    def close(self) -> None:
        self.transport.close()
