"""A client's line to the service: a bridge of its own, spoken to without a client library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

from tests.agents import Refused

__all__ = ["Gone", "Line"]

_META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "faults", "version": "0"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
_LONGEST_LINE = 2**28
_REPLY_S = 120.0


class Gone(Exception):
    """The line ended before the reply came; the text is what the bridge said on stderr."""


class Line:
    """One call at a time. Leaving `async with` ends the bridge as clients do: by closing its stdin."""

    def __init__(self, bridge: asyncio.subprocess.Process, said: Path) -> None:
        self.bridge, self._said = bridge, said
        self._calls = 0

    @classmethod
    async def open(cls, command: Sequence[str], env: dict[str, str], said: Path) -> Self:
        """`said` gets what the bridge writes on stderr."""
        with said.open("ab") as stderr:
            bridge = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=cast(IO[bytes], stderr),
                env=env,
                limit=_LONGEST_LINE,
                start_new_session=True,
            )
        return cls(bridge, said)

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    async def send(self, tool: str, **arguments: Any) -> None:
        """A call whose reply nobody waits for yet. Raises Gone."""
        assert self.bridge.stdin
        self._calls += 1
        params = {"name": tool, "arguments": arguments, "_meta": _META}
        request = {"jsonrpc": "2.0", "id": self._calls, "method": "tools/call", "params": params}
        try:
            self.bridge.stdin.write(json.dumps(request).encode() + b"\n")
            await self.bridge.stdin.drain()
        except (ConnectionError, BrokenPipeError) as error:
            raise Gone(self.said) from error

    async def reply(self) -> dict[str, Any]:
        """The structured reply to the last call. Raises Gone, and Refused."""
        assert self.bridge.stdout
        async with asyncio.timeout(_REPLY_S):
            while (answer := self._answer(await self.bridge.stdout.readline())).get("id") != self._calls:
                continue
        if "result" not in answer:
            raise Refused(json.dumps(answer.get("error")))
        result = answer["result"]
        if result.get("isError"):
            raise Refused("\n".join(block.get("text", "") for block in result["content"]))
        return cast(dict[str, Any], result["structuredContent"])

    def _answer(self, line: bytes) -> dict[str, Any]:
        if not line.endswith(b"\n"):
            raise Gone(self.said)
        return cast(dict[str, Any], json.loads(line))

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Raises Gone, and Refused."""
        await self.send(tool, **arguments)
        return await self.reply()

    async def close(self) -> int:
        """Close its stdin, and give the exit code of the bridge, which must end within 5 s."""
        assert self.bridge.stdin
        self.bridge.stdin.close()
        with suppress(ConnectionError):
            await self.bridge.stdin.wait_closed()
        async with asyncio.timeout(5):
            return await self.bridge.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
