"""The journey through the agent of Dragon: `python -m tests.clients.dragon_agent_journey URL [BACKEND]`.

It needs dragonhpc and a fastmcp below 4, and runs in plain Python as well as under `dragon`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import anyio
from dragon.ai.agent.config import MCPServerConfig
from dragon.ai.agent.reasoning.tool_dispatcher import ToolDispatcher
from dragon.ai.agent.tools import ToolRegistry

from tests.clients.journey import Refused, travel


class Traveller:
    """Stands where the language model of an agent stands, and asks for the tool calls of the journey in turn."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._told, self._tells = anyio.create_memory_object_stream[str]()
        self._heard, self._hears = anyio.create_memory_object_stream[dict[str, Any]]()

    async def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **_: object) -> str:
        """What the model says next, after it has read the answer to its last tool call."""
        if messages[-1]["role"] == "tool":
            await self._heard.send(json.loads(messages[-1]["content"]))
        else:
            print(len(tools), "tools")
        return await self._tells.receive()

    async def travel(self) -> None:
        await travel(self._call, backend=self._backend)
        await self._say({"type": "final_answer", "content": "arrived"})

    async def _call(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        request = {"name": f"rhapsody__{tool}", "args": arguments}
        await self._say({"type": "tool_request", "tool_calls": [request]})
        reply = await self._hears.receive()
        print(tool, json.dumps(reply)[:200])
        if "error" in reply and len(reply) == 1:
            raise Refused(reply["error"])
        return reply

    async def _say(self, response: dict[str, Any]) -> None:
        await self._told.send(json.dumps({"response": response}))


async def run(url: str, backend: str) -> None:
    """Connects as Dragon's agents do, with the 5 s a call that are their default, and lets the agent work."""
    server = MCPServerConfig(url=url, alias="rhapsody")
    traveller = Traveller(backend)
    agent = ToolDispatcher(traveller, ToolRegistry(), max_tool_call_iterations=100)
    await agent.connect_mcp(server.url, server.token, alias=server.alias, timeout=server.timeout)
    async with anyio.create_task_group() as group:
        group.start_soon(traveller.travel)
        ((*_, answer),) = await agent.chat([{"role": "user", "content": "Travel."}])
    await agent.close_mcp()
    print("Dragon's agent", answer["content"])


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], (sys.argv[2:] or ["local"])[0]))
