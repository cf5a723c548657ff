"""openai-agents: `pip install openai-agents`."""

import asyncio
import sys

from agents import Agent, Runner, set_tracing_disabled
from agents.mcp import MCPServerStdio, MCPServerStreamableHttp


async def main(server: str, prompt: str) -> None:
    is_url = server.startswith("http")
    stdio = MCPServerStdio({"command": server, "args": ["stdio"]})
    async with MCPServerStreamableHttp({"url": server}) if is_url else stdio as rhapsody:
        agent = Agent("scientist", model="gpt-5.2", mcp_servers=[rhapsody])
        result = await Runner.run(agent, prompt, max_turns=100)
    print(result.final_output)


set_tracing_disabled(True)
asyncio.run(main(*sys.argv[1:]))
