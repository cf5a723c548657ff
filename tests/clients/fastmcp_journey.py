"""The journey through the client of fastmcp: `python -m tests.clients.fastmcp_journey [--mode ERA] URL|COMMAND...`."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import fastmcp
from fastmcp import Client
from fastmcp.client.transports import StdioTransport
from fastmcp.exceptions import ToolError

from tests.clients.journey import Refused, travel


async def run(target: list[str], options: dict[str, Any]) -> None:
    """Connects to an address, or to a command's stdin and stdout; a person agrees to whatever is asked."""
    heard: list[str] = []
    progress: list[float] = []

    async def agree(message: str, form: Any, *_: object) -> Any:
        heard.append(message)
        return form(go_on=True)

    async def hear(done: float, *_: object) -> None:
        progress.append(done)

    server = target[0] if "://" in target[0] else StdioTransport(target[0], target[1:])
    async with Client(server, elicitation_handler=agree, progress_handler=hear, **options) as client:
        print(len(await client.list_tools()), "tools")

        async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
            try:
                result = await client.call_tool(tool, arguments)
            except ToolError as error:
                print(f"{tool} REFUSED {error}")
                raise Refused(str(error)) from error
            assert result.data is not None, "the reply does not fit the output schema"
            reply: dict[str, Any] = result.structured_content
            print(tool, json.dumps(reply)[:200])
            return reply

        await travel(call, asks=True)
    assert len(heard) == 1 and "Go on?" in heard[0], heard
    assert progress, "no progress was heard of"
    print("a person agreed to:", heard[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", help="auto or legacy, from fastmcp 4 on")
    parser.add_argument("target", nargs=argparse.REMAINDER, metavar="URL|COMMAND...")
    asked = parser.parse_args()
    asyncio.run(run(asked.target, {"mode": asked.mode} if asked.mode else {}))
    print("fastmcp", fastmcp.__version__, "arrived")
