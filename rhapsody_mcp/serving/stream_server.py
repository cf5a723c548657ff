"""Serves one MCP client, on stdin and stdout or on a connection to the service."""

from __future__ import annotations

import json
import os
from typing import Any, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage

from rhapsody_mcp.server import Server
from rhapsody_mcp.serving.invalid_messages import ENDS, answer_unreadable, cut_line

__all__ = ["Wire", "serve_client"]

_LONGEST_ORDER = 1 << 20


class Wire:
    """Lines of text over a byte stream, as the SDK reads and writes a file. It holds no thread.

    Of a message that is longer than `longest` it keeps what an answer needs.
    """

    def __init__(self, stream: ByteStream, longest: int = _LONGEST_ORDER) -> None:
        self._stream, self._longest = stream, longest
        self._heard = bytearray()
        self._looked = 0

    async def line(self, longest: int | None = None) -> str:
        """With its end; at the end of the stream what there is, perhaps nothing.

        Raises ValueError where it is longer than `longest`.
        """
        while (end := self._heard.find(b"\n", self._looked)) < 0:
            self._looked = len(self._heard)
            if longest is not None and self._looked > longest:
                raise ValueError(f"a line of more than {longest} bytes")
            try:
                self._heard += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                end = self._looked
                break
        if longest is not None and end > longest:
            raise ValueError(f"a line of more than {longest} bytes")
        line = self._heard[: end + 1].decode(errors="replace")
        del self._heard[: end + 1]
        self._looked = 0
        return line

    async def hear(self) -> dict[str, Any]:
        """A message of ours; empty at the end of the stream, and for what is none."""
        try:
            message = json.loads(await self.line(_LONGEST_ORDER))
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    async def tell(self, **message: Any) -> None:
        """Nothing happens where nobody hears it."""
        try:
            await self._stream.send(json.dumps(message).encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    async def wait_for_end(self) -> None:
        """Until the other end is closed; what it still says is passed over."""
        while await self.line(_LONGEST_ORDER):
            pass

    def held(self) -> int:
        """A descriptor more of the connection, which has not ended for the other end before it is closed too."""
        return os.dup(self._stream.extra(SocketAttribute.raw_socket).fileno())

    def __aiter__(self) -> Wire:
        return self

    async def __anext__(self) -> str:
        try:
            line = await self.line(self._longest)
        except ValueError:
            return await self._cut()
        if not line:
            raise StopAsyncIteration
        return line

    async def _cut(self) -> str:
        """What stands for the line that begins with what was heard. It is read to its end, and not kept."""
        begin = bytes(self._heard[:ENDS])
        while (end := self._heard.find(b"\n")) < 0:
            del self._heard[:-ENDS]
            try:
                self._heard += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                end = len(self._heard)
                break
        shown = cut_line(begin, bytes(self._heard[:end]), self._longest)
        del self._heard[: end + 1]
        self._looked = 0
        return shown

    async def write(self, text: str) -> None:
        """Raises ClosedResourceError where nobody hears it, as the SDK expects."""
        try:
            await self._stream.send(text.encode())
        except anyio.BrokenResourceError as error:
            raise anyio.ClosedResourceError from error

    async def flush(self) -> None:
        """Nothing is held back."""


async def serve_client(server: Server, wire: Wire, answers: Wire | None) -> None:
    """Until the client closes its end; it is answered on stdout where there are no `answers`."""
    lowlevel = server._lowlevel_server  # the SDK's own run_stdio_async leaves no place between it and the streams
    heard, readable = anyio.create_memory_object_stream[SessionMessage](0)
    async with stdio_server(cast(Any, wire), cast(Any, answers)) as (read, write), anyio.create_task_group() as group:
        group.start_soon(answer_unreadable, read, heard, write)
        await lowlevel.run(readable, write, lowlevel.create_initialization_options())
