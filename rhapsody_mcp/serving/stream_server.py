"""Serves one MCP client on a byte stream: stdin and stdout, or a connection to the service."""

from __future__ import annotations

import json
import os
from typing import Any, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage

from rhapsody_mcp.server import Server
from rhapsody_mcp.serving.invalid_messages import EXCERPT_BYTES, answer_unreadable, oversized_line

__all__ = ["LineStream", "serve_client"]

_MAX_CONTROL_BYTES = 1 << 20


class LineStream:
    """Lines of text over a byte stream, with the methods that the SDK expects of a text file. Uses no thread.

    Iteration replaces a line of more than `max_bytes` by a short one that `answer_unreadable` can answer.
    """

    def __init__(self, stream: ByteStream, max_bytes: int = _MAX_CONTROL_BYTES) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._buffer = bytearray()
        self._searched = 0
        """Bytes of the buffer without a line end."""

    async def read_line(self, max_bytes: int | None = None) -> str:
        """The next line with its line end. At the end of the stream: the rest, which may be empty.

        Raises ValueError for a line of more than `max_bytes`.
        """
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if max_bytes is not None and self._searched > max_bytes:
                raise ValueError(f"a line of more than {max_bytes} bytes")
            try:
                self._buffer += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                end = self._searched
                break
        if max_bytes is not None and end > max_bytes:
            raise ValueError(f"a line of more than {max_bytes} bytes")
        line = self._buffer[: end + 1].decode(errors="replace")
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def receive_message(self) -> dict[str, Any]:
        """A message of the control protocol; empty at the end of the stream and for an invalid message."""
        try:
            message = json.loads(await self.read_line(_MAX_CONTROL_BYTES))
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    async def send_message(self, **message: Any) -> None:
        """Send a message of the control protocol; does nothing if the peer has closed the connection."""
        try:
            await self._stream.send(json.dumps(message).encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    async def wait_for_close(self) -> None:
        """Return when the peer has closed the connection; drops what the peer still sends."""
        while await self.read_line(_MAX_CONTROL_BYTES):
            pass

    def duplicate_descriptor(self) -> int:
        """A second descriptor of the connection. The peer sees the connection's end once both are closed."""
        return os.dup(self._stream.extra(SocketAttribute.raw_socket).fileno())

    def __aiter__(self) -> LineStream:
        return self

    async def __anext__(self) -> str:
        try:
            line = await self.read_line(self._max_bytes)
        except ValueError:
            return await self._skip_oversized()
        if not line:
            raise StopAsyncIteration
        return line

    async def _skip_oversized(self) -> str:
        """Read the line to its end without keeping it; returns its replacement."""
        begin = bytes(self._buffer[:EXCERPT_BYTES])
        while (end := self._buffer.find(b"\n")) < 0:
            del self._buffer[:-EXCERPT_BYTES]
            try:
                self._buffer += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                end = len(self._buffer)
                break
        replacement = oversized_line(begin, bytes(self._buffer[:end]), self._max_bytes)
        del self._buffer[: end + 1]
        self._searched = 0
        return replacement

    async def write(self, text: str) -> None:
        """Raises ClosedResourceError if the peer has closed the connection, as the SDK expects."""
        try:
            await self._stream.send(text.encode())
        except anyio.BrokenResourceError as error:
            raise anyio.ClosedResourceError from error

    async def flush(self) -> None:
        """Does nothing: `write` does not buffer."""


async def serve_client(server: Server, requests: LineStream, replies: LineStream | None) -> None:
    """Serve until the client closes its end. Without `replies` the replies go to stdout."""
    lowlevel = server._lowlevel_server  # run_stdio_async has no place for answer_unreadable
    send_readable, readable = anyio.create_memory_object_stream[SessionMessage](0)
    async with (
        stdio_server(cast(Any, requests), cast(Any, replies)) as (read, write),
        anyio.create_task_group() as group,
    ):
        group.start_soon(answer_unreadable, read, send_readable, write)
        await lowlevel.run(readable, write, lowlevel.create_initialization_options())
