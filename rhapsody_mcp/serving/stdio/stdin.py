"""Stdin as a byte stream."""

from __future__ import annotations

import os

import anyio
import anyio.to_thread
from anyio.abc import ByteStream

__all__ = ["StdinStream"]


class StdinStream(ByteStream):
    """While the stream is open, descriptor 0 is /dev/null: neither other code nor child processes can read stdin."""

    def __init__(self) -> None:
        self._stdin = os.dup(0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if not (data := await anyio.to_thread.run_sync(os.read, self._stdin, max_bytes)):
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        raise NotImplementedError("nothing is said on stdin")

    async def send_eof(self) -> None:
        raise NotImplementedError("nothing is said on stdin")

    async def aclose(self) -> None:
        os.dup2(self._stdin, 0)
        os.close(self._stdin)
