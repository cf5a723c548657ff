"""google-adk: `pip install 'google-adk[mcp]'`."""

import asyncio
import sys

from google.adk.agents import LlmAgent
from google.adk.runners import InMemoryRunner
from google.adk.tools.mcp_tool import McpToolset, StdioConnectionParams, StreamableHTTPConnectionParams
from google.genai import types
from mcp import StdioServerParameters


async def main(server: str, prompt: str) -> None:
    if server.startswith("http"):
        connection = StreamableHTTPConnectionParams(url=server)
    else:
        connection = StdioConnectionParams(server_params=StdioServerParameters(command=server, args=["stdio"]))
    toolset = McpToolset(connection_params=connection)
    agent = LlmAgent(name="scientist", model="gemini-3-pro", tools=[toolset])
    runner = InMemoryRunner(agent)
    session = await runner.session_service.create_session(app_name=runner.app_name, user_id="user")
    message = types.Content(role="user", parts=[types.Part(text=prompt)])
    async for event in runner.run_async(user_id="user", session_id=session.id, new_message=message):
        if event.is_final_response() and event.content is not None:
            print(event.content.parts[0].text)
    await runner.close()


asyncio.run(main(*sys.argv[1:]))
