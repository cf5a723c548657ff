"""Carries many streams of bytes over one connection.

A frame is the number of its stream and the length of its data, four bytes each, then the data. A frame without data
ends its stream. The first frame of a stream has one byte, the kind of the stream. Stream 0 carries control messages in
the frames of `engine.transport`, and has no kind.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, cast

__all__ = ["FILE", "PORT", "PROCESS", "Multiplexer", "Stream", "StreamUser"]

PROCESS, FILE, PORT = b"p", b"f", b"t"
"""The kinds of streams: the connection of a process of the node, a request for a file of the other end, and a
connection with a port of the other end's node."""
_CONTROL = 0
_HEADER = struct.Struct(">II")


class StreamUser(Protocol):
    """What one end of a stream does with the data; its methods are called in the event loop."""

    def stream_received(self, data: bytes) -> None: ...

    def stream_ended(self) -> None:
        """The other end has ended the stream, or the connection is lost. Not called after `Stream.end`."""


class Stream:
    """One stream of a multiplexer. `user` receives its data."""

    def __init__(self, multiplexer: Multiplexer, number: int) -> None:
        self._multiplexer, self.number = multiplexer, number
        self.user: StreamUser | None = None

    def write(self, data: bytes) -> None:
        """Send data; never blocks. Nothing happens where the stream has ended."""
        self._multiplexer.send(self, data)

    async def drain(self) -> None:
        """Wait until the connection has room for more data. Returns at once where the connection is lost."""
        await asyncio.sleep(0)  # what was written goes to the transport
        await self._multiplexer.has_room.wait()

    def end(self) -> None:
        """End the stream at both ends, after what was written."""
        self._multiplexer.end(self)


class Multiplexer(asyncio.Protocol):
    """One end of a connection with many streams.

    `open_stream` is called with each stream that the other end opens, and its kind; it must set the stream's `user`.
    `on_first_data` is called before the first data is received, `on_lost` when the connection ends. `is_server` tells
    the ends apart: the server opens streams with even numbers.
    """

    def __init__(
        self,
        *,
        is_server: bool,
        open_stream: Callable[[Stream, bytes], None],
        on_first_data: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_stream, self._on_first_data, self._on_lost = open_stream, on_first_data, on_lost
        self._next_number = 2 if is_server else 1
        self.control = Stream(self, _CONTROL)
        self._streams: dict[int, Stream] = {_CONTROL: self.control}
        self._buffer = bytearray()
        self._has_received = False
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self.lost, self.has_room = asyncio.Event(), asyncio.Event()
        """`lost` is set when the connection has ended, `has_room` while the other end keeps up."""
        self.has_room.set()
        self.last_received = asyncio.get_running_loop().time()
        """When data came last, by the clock of the event loop."""

    # --- streams

    def new_stream(self, user: StreamUser, kind: bytes) -> Stream:
        """Open a stream; it ends at once where the connection is lost."""
        stream = self._streams[self._next_number] = Stream(self, self._next_number)
        stream.user = user
        if self.lost.is_set():
            del self._streams[stream.number]
            asyncio.get_running_loop().call_soon(user.stream_ended)
        self._next_number += 2
        stream.write(kind)
        return stream

    def send(self, stream: Stream, data: bytes) -> None:
        if data and stream.number in self._streams:
            self._write(_HEADER.pack(stream.number, len(data)), data)

    def end(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None) is not None:
            self._write(_HEADER.pack(stream.number, 0))

    def _write(self, *parts: bytes) -> None:
        """Write the parts together with all that is written in this turn of the event loop: one record of TLS."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.extend(parts)

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is not None and data:
            self._transport.write(data)

    # --- the connection

    def close(self) -> None:
        """End the connection once all that was written is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    async def close_and_wait(self, within_s: float) -> None:
        """Close the connection, and wait up to `within_s` until all is sent."""
        self.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.lost.wait()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no asyncio.Transport

    def data_received(self, data: bytes) -> None:
        if not self._has_received:
            self._has_received = True
            self._on_first_data()
        self.last_received = asyncio.get_running_loop().time()
        self._buffer += data
        position, available = 0, len(self._buffer)
        while available - position >= _HEADER.size:
            number, length = _HEADER.unpack_from(self._buffer, position)
            end = position + _HEADER.size + length
            if available < end:
                break
            self._receive(number, bytes(memoryview(self._buffer)[end - length : end]))
            position = end
        del self._buffer[:position]

    def _receive(self, number: int, data: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None and data and number % 2 != self._next_number % 2:  # the other end opens it
            stream = self._streams[number] = Stream(self, number)
            self._open_stream(stream, data)
            return
        if stream is None or stream.user is None:  # ended here while its data was on the way
            return
        if data:
            stream.user.stream_received(data)
        else:
            del self._streams[number]
            stream.user.stream_ended()

    def pause_writing(self) -> None:
        self.has_room.clear()

    def resume_writing(self) -> None:
        self.has_room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.lost.set()
        self.has_room.set()
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            if stream.user is not None:
                stream.user.stream_ended()
        self._on_lost()
