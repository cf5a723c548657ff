"""Puts the server together."""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, InputRequiredResult

from rhapsody_mcp import __version__
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.runtime.open_sessions import OpenSessions
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.text import read_cards, read_prompt
from rhapsody_mcp.toolsets.card_tool import make_tools
from rhapsody_mcp.toolsets.insight import Insight
from rhapsody_mcp.toolsets.refusals import refuse_call
from rhapsody_mcp.toolsets.sessions import Sessions
from rhapsody_mcp.toolsets.tasks import Tasks

__all__ = ["Server", "build_server"]


class Server(MCPServer):
    """An MCP server that helps where a tool's name is wrong, too."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        names = [tool.name for tool in self._tool_manager.list_tools()]
        if name not in names:
            raise ToolError(refuse_call(UnknownName("tool", name, names), "one of these"))
        return await super().call_tool(name, arguments, context)


def build_server(settings: Settings, sessions: OpenSessions) -> Server:
    """A server that speaks of these sessions; whoever made them closes them.

    Raises RhapsodyError where a tool lacks its card or a card its tool.
    """
    toolsets = [Sessions(sessions), Tasks(sessions, settings), Insight(sessions, settings)]
    return Server(
        "rhapsody",
        title="Rhapsody",
        description="Runs functions, programs, parallel jobs and language-model prompts on this machine.",
        instructions=read_prompt("instructions"),
        version=__version__,
        tools=make_tools(toolsets, read_cards()),
        log_level="WARNING",
    )
