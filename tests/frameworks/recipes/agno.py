"""agno: `pip install 'agno[mcp,openai]'`."""

import asyncio
import sys

from agno.agent import Agent
from agno.models.openai import OpenAIChat
from agno.tools.mcp import MCPTools
from mcp import StdioServerParameters


async def main(server: str, prompt: str) -> None:
    is_url = server.startswith("http")
    stdio = StdioServerParameters(command=server, args=["stdio"])
    tools = MCPTools(url=server, transport="streamable-http") if is_url else MCPTools(server_params=stdio)
    async with tools:
        agent = Agent(model=OpenAIChat(id="gpt-5.2"), tools=[tools], telemetry=False)
        result = await agent.arun(prompt)
    print(result.content)


asyncio.run(main(*sys.argv[1:]))
