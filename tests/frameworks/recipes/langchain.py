"""langchain-mcp-adapters: `pip install langchain-mcp-adapters langchain langchain-openai`."""

import asyncio
import sys

from langchain.agents import create_agent
from langchain_mcp_adapters.client import MultiServerMCPClient


async def main(server: str, prompt: str) -> None:
    stdio = {"transport": "stdio", "command": server, "args": ["stdio"]}
    http = {"transport": "streamable_http", "url": server}
    client = MultiServerMCPClient({"rhapsody": http if server.startswith("http") else stdio})
    agent = create_agent("openai:gpt-5.2", await client.get_tools())
    result = await agent.ainvoke({"messages": prompt}, {"recursion_limit": 100})
    print(result["messages"][-1].content)


asyncio.run(main(*sys.argv[1:]))
