"""llama-index: `pip install llama-index-tools-mcp llama-index-llms-openai`."""

import asyncio
import sys

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai import OpenAI
from llama_index.tools.mcp import BasicMCPClient, McpToolSpec


async def main(server: str, prompt: str) -> None:
    client = BasicMCPClient(server, [] if server.startswith("http") else ["stdio"])
    tools = await McpToolSpec(client).to_tool_list_async()
    agent = FunctionAgent(tools=tools, llm=OpenAI("gpt-5.2"))
    print(await agent.run(prompt, max_iterations=100))


asyncio.run(main(*sys.argv[1:]))
