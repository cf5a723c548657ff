"""strands: `pip install 'strands-agents[openai]'`."""

import sys

from mcp import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from strands import Agent
from strands.models.openai import OpenAIModel
from strands.tools.mcp import MCPClient


def main(server: str, prompt: str) -> None:
    if server.startswith("http"):
        client = MCPClient(lambda: streamable_http_client(server))
    else:
        client = MCPClient(lambda: stdio_client(StdioServerParameters(command=server, args=["stdio"])))
    agent = Agent(OpenAIModel(model_id="gpt-5.2"), tools=[client], callback_handler=None)
    print(agent(prompt))


main(*sys.argv[1:])
