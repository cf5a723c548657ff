"""Frames of messages over a Unix socket.

A frame is the length in eight bytes, then a list of messages in msgpack. After a send returns, the kernel delivers the
data in order, even if the sender is killed. (A ZeroMQ socket sends in a thread of its own: 36 of 100 processes that
called os._exit after a send lost the last message.)
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

__all__ = ["Frames", "Link", "frame", "unread_data"]

_HEADER = 8
_CHUNK = 1 << 20
_ENCODER = msgspec.msgpack.Encoder()
Received = TypeVar("Received")


def frame(messages: list[object]) -> bytes:
    """Return the bytes of one frame."""
    body = _ENCODER.encode(messages)
    return len(body).to_bytes(_HEADER, "big") + body


def unread_data(descriptor: int) -> bytes:
    """Return what the other end of a socket sent before it died, and asyncio has not read: a failed write ends a
    connection before that."""
    data = b""
    with suppress(OSError):  # the socket has no more data
        while chunk := os.read(descriptor, _CHUNK):
            data += chunk
    return data


class Frames(Generic[Received]):
    """Splits a stream of bytes into messages. `kind` is the type of one message."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[Received]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Received]:
        """Add data, and yield every message that is complete."""
        self._buffer += data
        while len(self._buffer) >= _HEADER:
            end = _HEADER + int.from_bytes(self._buffer[:_HEADER], "big")
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_HEADER:end])
            del self._buffer[:end]
            yield from self._decoder.decode(body)


class Link(Generic[Received]):
    """A blocking connection to the backend; one thread may send while another receives."""

    def __init__(self, address: str, kind: object) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(address)
        self._frames: Frames[Received] = Frames(kind)

    def send(self, *messages: object) -> None:
        """Send the messages in one frame; return when the kernel has accepted all data."""
        self.socket.sendall(frame(list(messages)))

    def receive(self) -> list[Received]:
        """Wait for messages, and return them. Raises EOFError if the backend has closed the connection."""
        while True:
            data = self.socket.recv(_CHUNK)
            if not data:
                raise EOFError
            if messages := list(self._frames.feed(data)):
                return messages

    def ready(self) -> bool:
        """Return whether data can be received without waiting."""
        return bool(select.select([self.socket], [], [], 0)[0])
