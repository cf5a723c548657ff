"""pydantic-ai: `pip install 'pydantic-ai-slim[mcp,openai]'`."""

import asyncio
import sys

from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from pydantic_ai import Agent
from pydantic_ai.mcp import MCPToolset


async def main(server: str, prompt: str) -> None:
    is_url = server.startswith("http")
    transport = StreamableHttpTransport(server) if is_url else StdioTransport(server, ["stdio"])
    agent = Agent("openai-chat:gpt-5.2", toolsets=[MCPToolset(transport)])
    async with agent:
        result = await agent.run(prompt)
    print(result.output)


asyncio.run(main(*sys.argv[1:]))
