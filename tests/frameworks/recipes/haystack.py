"""mcp-haystack: `pip install mcp-haystack haystack-ai`."""

import sys

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack_integrations.tools.mcp import MCPToolset, StdioServerInfo, StreamableHttpServerInfo


def main(server: str, prompt: str) -> None:
    is_url = server.startswith("http")
    info = StreamableHttpServerInfo(url=server) if is_url else StdioServerInfo(command=server, args=["stdio"])
    toolset = MCPToolset(info)
    agent = Agent(chat_generator=OpenAIChatGenerator(model="gpt-5.2"), tools=toolset, max_agent_steps=100)
    print(agent.run(messages=[ChatMessage.from_user(prompt)])["last_message"].text)
    toolset.close()


main(*sys.argv[1:])
