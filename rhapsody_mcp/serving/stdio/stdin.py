"""Reads what this process is told on stdin."""

from __future__ import annotations

import os

import anyio
import anyio.to_thread
from anyio.abc import ByteStream

__all__ = ["Stdin"]


class Stdin(ByteStream):
    """Until it is closed, nobody else finds anything on stdin: neither what runs here nor what it starts."""

    def __init__(self) -> None:
        self._told = os.dup(0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if not (heard := await anyio.to_thread.run_sync(os.read, self._told, max_bytes)):
            raise anyio.EndOfStream
        return heard

    async def send(self, item: bytes) -> None:
        raise NotImplementedError("nothing is said on stdin")

    async def send_eof(self) -> None:
        raise NotImplementedError("nothing is said on stdin")

    async def aclose(self) -> None:
        os.dup2(self._told, 0)
        os.close(self._told)
