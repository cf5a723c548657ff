"""smolagents: `pip install 'smolagents[mcp,openai]' 'mcp<2'`."""

import sys

from mcp import StdioServerParameters
from smolagents import OpenAIModel, ToolCallingAgent, ToolCollection


def main(server: str, prompt: str) -> None:
    is_url = server.startswith("http")
    stdio = StdioServerParameters(command=server, args=["stdio"])
    parameters = {"url": server, "transport": "streamable-http"} if is_url else stdio
    with ToolCollection.from_mcp(parameters, trust_remote_code=True) as rhapsody:
        for tool in rhapsody.tools:
            for parameter in tool.inputs.values():
                parameter["nullable"] = True  # smolagents takes every other parameter for required
        agent = ToolCallingAgent([*rhapsody.tools], OpenAIModel("gpt-5.2"), max_steps=40)
        print(agent.run(prompt))


main(*sys.argv[1:])
