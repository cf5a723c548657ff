"""Forwards TCP connections to a port on the other end's node, which listens on loopback alone."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import cast

from rhapsody_mcp.engine.network.multiplexer import PORT, Multiplexer, Stream

__all__ = ["connect_to_port", "forward_port"]

_LOOPBACK = "127.0.0.1"


async def forward_port(connection: Multiplexer, port: int) -> asyncio.Server:
    """Listen on a free port of loopback here; each connection goes to `port` on the other end's node."""
    return await asyncio.get_running_loop().create_server(lambda: _Forwarded(connection, port), _LOOPBACK, 0)


def connect_to_port(stream: Stream) -> None:
    """Connect a stream that the other end has opened to the port of this node that its first data names."""
    _Arrived(stream)


class _Piped(asyncio.Protocol):
    """One end of a TCP connection whose data is carried by a stream."""

    transport: asyncio.Transport | None = None
    stream: Stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.stream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stream.end()

    def stream_received(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def stream_ended(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _Forwarded(_Piped):
    def __init__(self, connection: Multiplexer, port: int) -> None:
        self.stream = connection.new_stream(self, PORT)
        self.stream.write(b"%d\0" % port)


class _Arrived(_Piped):
    """Data that comes before the connection with the port is there waits."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self._waiting = stream, b""
        self._connecting: asyncio.Task[None] | None = None
        stream.user = self

    def stream_received(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)
            return
        self._waiting += data
        if self._connecting is None and b"\0" in self._waiting:
            port, _, self._waiting = self._waiting.partition(b"\0")
            self._connecting = asyncio.create_task(self._connect(int(port)))

    async def _connect(self, port: int) -> None:
        with suppress(OSError):
            await asyncio.get_running_loop().create_connection(lambda: self, _LOOPBACK, port)
        if self.transport is None:
            self.stream.end()
        else:
            self.transport.write(self._waiting)
