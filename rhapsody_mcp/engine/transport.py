"""Frames of messages over a Unix socket.

A frame is eight bytes of length, then a list of messages as msgpack. What was sent is in the kernel's hands: it
arrives, in order, also when the sender is killed the next moment. (A ZeroMQ socket lost the last message of 36 in
100 processes that called os._exit after sending it: its own thread sends.)
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

__all__ = ["Frames", "Link", "frame"]

_HEADER = 8
_CHUNK = 1 << 20
_ENCODER = msgspec.msgpack.Encoder()
Received = TypeVar("Received")


def frame(messages: list[object]) -> bytes:
    """The bytes of one frame."""
    body = _ENCODER.encode(messages)
    return len(body).to_bytes(_HEADER, "big") + body


class Frames(Generic[Received]):
    """Cuts a stream of bytes into frames. `kind` is the type of one message."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[Received]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Received]:
        """Every message that is complete now."""
        self._buffer += data
        while len(self._buffer) >= _HEADER:
            end = _HEADER + int.from_bytes(self._buffer[:_HEADER], "big")
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_HEADER:end])
            del self._buffer[:end]
            yield from self._decoder.decode(body)


class Link(Generic[Received]):
    """A blocking connection to the backend; one thread sends, one receives."""

    def __init__(self, address: str, kind: object) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(address)
        self._frames: Frames[Received] = Frames(kind)

    def send(self, *messages: object) -> None:
        """Returns when the kernel has them."""
        self.socket.sendall(frame(list(messages)))

    def receive(self) -> list[Received]:
        """Wait for messages. Raises EOFError where the backend is gone."""
        while True:
            data = self.socket.recv(_CHUNK)
            if not data:
                raise EOFError
            if messages := list(self._frames.feed(data)):
                return messages

    def ready(self) -> bool:
        """Whether something can be received now."""
        return bool(select.select([self.socket], [], [], 0)[0])
