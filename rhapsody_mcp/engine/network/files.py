"""Copies files over a stream of a multiplexer, from disk to disk, a piece at a time.

The end that needs a file opens a stream of kind FILE and sends the path. The other end answers with the size in eight
bytes, then the content. A stream that ends before means that the file cannot be read. A file that is moved is deleted
once the end that needs it has said, with one byte, that it has the file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from rhapsody_mcp.engine.network.multiplexer import FILE, Multiplexer, Stream
from rhapsody_mcp.engine.task.output import end_part, open_part

__all__ = ["FileServer", "SharedCopies", "fetch_file"]

_SIZE_BYTES = 8
_PIECE_BYTES = 1 << 18
_RECEIVED = b"r"


async def fetch_file(connection: Multiplexer, path: str, folder: str) -> str:
    """Copy the file at `path` of the other end into `folder`; return the path of the copy.

    Raises OSError where the other end cannot read the file, where the connection is lost, or where the disk is full.
    """
    arriving = _ArrivingFile(folder, os.path.splitext(path)[1])
    stream = connection.new_stream(arriving, FILE)
    stream.write(path.encode("utf-8", "surrogateescape") + b"\0")
    try:
        copy = await arriving.path
        stream.write(_RECEIVED)
        return copy
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be copied: {error.strerror or error}") from error
    finally:
        stream.end()


class SharedCopies:
    """Copies each file once, however many ask for it; a copy that failed is made again for the next who asks.

    `fetch` copies the file at a path of the other end, and returns the path of the copy, or raises OSError.
    """

    def __init__(self, fetch: Callable[[str], Coroutine[Any, Any, str]]) -> None:
        self._fetch = fetch
        self._copies: dict[str, asyncio.Task[str]] = {}

    async def copy_of(self, path: str) -> str:
        """The path of the copy. Raises OSError."""
        if path not in self._copies:
            self._copies[path] = asyncio.create_task(self._copy(path))
        return await asyncio.shield(self._copies[path])

    async def _copy(self, path: str) -> str:
        try:
            return await self._fetch(path)
        except OSError:
            del self._copies[path]
            raise

    async def cancel(self) -> None:
        """End the copies that are under way."""
        for copy in self._copies.values():
            copy.cancel()
        await asyncio.gather(*self._copies.values(), return_exceptions=True)


class _ArrivingFile:
    def __init__(self, folder: str, suffix: str) -> None:
        self._part, self._suffix = open_part(folder), suffix
        self.path: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._size: int | None = None
        self._received = 0
        self._beginning = b""

    def stream_received(self, data: bytes) -> None:
        if self.path.done():
            return
        if self._size is None:
            self._beginning += data
            if len(self._beginning) < _SIZE_BYTES:
                return
            self._size = int.from_bytes(self._beginning[:_SIZE_BYTES], "big")
            data = self._beginning[_SIZE_BYTES:]
        self._received += len(data)
        try:
            self._part.write(data)
            if self._received == self._size:
                self.path.set_result(end_part(self._part, self._suffix))
        except OSError as error:
            self._fail(error)

    def stream_ended(self) -> None:
        if not self.path.done():
            self._fail(FileNotFoundError(2, "the node that has the file cannot read it, or is gone"))

    def _fail(self, error: OSError) -> None:
        self.path.set_exception(error)
        with suppress(OSError):
            self._part.close()
        with suppress(OSError):
            os.unlink(self._part.name)


class FileServer:
    """Answers one request for a file. `may_read` says whether the other end may read a path. With `moves`, the file is
    deleted once the other end has it."""

    def __init__(self, stream: Stream, may_read: Callable[[str], bool], *, moves: bool = False) -> None:
        self._stream, self._may_read, self._moves = stream, may_read, moves
        self._request, self._path = b"", ""
        self._sending: asyncio.Task[None] | None = None
        stream.user = self

    def stream_received(self, data: bytes) -> None:
        self._request += data
        if self._sending is not None:
            self._delete()
        elif self._request.endswith(b"\0"):
            self._path = os.fsdecode(self._request[:-1])
            self._sending = asyncio.create_task(self._send())

    def _delete(self) -> None:
        if self._moves and self._may_read(self._path):
            with suppress(OSError):
                os.unlink(self._path)

    def stream_ended(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    async def _send(self) -> None:
        with suppress(OSError):
            if self._may_read(self._path):
                await self._send_content()
                if self._moves:  # the other end ends the stream
                    return
        self._stream.end()

    async def _send_content(self) -> None:
        with open(self._path, "rb") as file:  # noqa: ASYNC230 - a piece is read in less than a millisecond
            size = os.fstat(file.fileno()).st_size
            self._stream.write(size.to_bytes(_SIZE_BYTES, "big"))
            while piece := file.read(_PIECE_BYTES):
                self._stream.write(piece)
                await self._stream.drain()
