"""Builds the MCP server from toolsets, resources, prompts and middleware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from mcp.server.apps import client_supports_apps
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver import Context, Extension, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, GetPromptResult, InputRequiredResult
from pydantic import AnyUrl

from rhapsody_mcp import __version__
from rhapsody_mcp.cards import read_cards, read_prompt, read_prompts
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.protocol.apps import REFRESH_TOOL, Page, hidden_without_apps
from rhapsody_mcp.protocol.audit import Audit, audit_deferred
from rhapsody_mcp.protocol.completions import Completions
from rhapsody_mcp.protocol.dashboard import Dashboard
from rhapsody_mcp.protocol.durability import durable_replies
from rhapsody_mcp.protocol.output_watch import OutputWatch
from rhapsody_mcp.protocol.prompts import make_prompt, refuse_prompt
from rhapsody_mcp.protocol.resource_updates import ResourceUpdates
from rhapsody_mcp.protocol.resources import Resources, add_resources, with_own_types
from rhapsody_mcp.protocol.subscriptions import Subscriptions
from rhapsody_mcp.runtime.backend_factory import open_backends
from rhapsody_mcp.runtime.recovery.recorder import Storage
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.functions import Functions
from rhapsody_mcp.toolsets.insight import Insight
from rhapsody_mcp.toolsets.sessions import Sessions
from rhapsody_mcp.toolsets.tasks import Tasks
from rhapsody_mcp.toolsets.tooling.card_tool import make_tools
from rhapsody_mcp.toolsets.tooling.confirmation import ServerState
from rhapsody_mcp.toolsets.tooling.errors import error_text
from rhapsody_mcp.toolsets.tooling.tool_selection import select_tools

__all__ = ["Server", "build_server", "open_sessions"]


class Server(MCPServer):
    """An MCP server that suggests names where a tool's or a prompt's name is unknown."""

    detachers: Sequence[Callable[[], None]] = ()
    """Each ends one subscription to changes of the sessions."""

    def detach(self) -> None:
        """End the server's subscriptions to the sessions, which may outlive the server."""
        for detach in self.detachers:
            detach()

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        names = [tool.name for tool in await self.list_tools() if tool.name != REFRESH_TOOL]
        is_refresh = name == REFRESH_TOOL and context is not None and client_supports_apps(context)
        if name not in names and not is_refresh:
            raise ToolError(error_text(UnknownName("tool", name, names), "one of these"))
        return await audit_deferred(super().call_tool(name, arguments, context))

    async def read_resource(
        self, uri: AnyUrl | str, context: Context[Any, Any] | None = None
    ) -> Iterable[ReadResourceContents] | InputRequiredResult:
        contents = await super().read_resource(uri, context)
        return contents if isinstance(contents, InputRequiredResult) else with_own_types(contents)

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> GetPromptResult | InputRequiredResult:
        names = [prompt.name for prompt in await self.list_prompts()]
        if name not in names:
            raise refuse_prompt(UnknownName("prompt", name, names))
        return await super().get_prompt(name, arguments, context)


def open_sessions(settings: Settings, ledger: Ledger | None = None) -> SessionRegistry:
    """A registry without sessions. With a ledger, its `restore` opens the sessions of the ledger."""
    storage = Storage(ledger, ledger.folder) if ledger is not None else None
    return SessionRegistry(partial(open_backends, settings=settings), storage, settings.engine_idle_s, settings)


def build_server(
    settings: Settings, sessions: SessionRegistry, extensions: Sequence[Extension] = (), audit: Audit | None = None
) -> Server:
    """A server with tools for these sessions. The caller keeps ownership of sessions, extensions and audit.

    Raises RhapsodyError for a tool without a card and a card without a tool, UnknownName where the settings name an
    unknown toolset.
    """
    cards = read_cards()
    offered = select_tools(cards, settings)
    session_tools, task_tools = Sessions(sessions, settings), Tasks(sessions, settings)
    insight_tools = Insight(sessions, settings)
    toolsets = [session_tools, task_tools, insight_tools, Functions(sessions)]
    updates = ResourceUpdates(settings.notice_interval_s)
    state = ServerState(sessions, settings)
    server = Server(
        "rhapsody",
        title="Rhapsody",
        description="Runs functions, programs, parallel jobs and language-model prompts on this machine.",
        instructions=offered.instructions(read_prompt("instructions")),
        version=__version__,
        tools=[tool for tool in make_tools(toolsets, cards) if tool.name in offered.names],
        extensions=[*extensions, Page(Dashboard(sessions))],
        lifespan=lambda _: nullcontext(state),
        subscriptions=updates.bus,
        middleware=[hidden_without_apps, audit or Audit(), durable_replies(sessions)],
        log_level="WARNING",
    )
    prompts = offered.prompts(read_prompts())
    for prompt in prompts:
        server.add_prompt(make_prompt(prompt, sessions))
    resources = Resources(sessions, session_tools, task_tools, insight_tools)
    add_resources(server, resources)
    Completions(sessions, prompts).serve(server)
    Subscriptions(server, updates, resources.check).serve()
    server.detachers = (sessions.watch(updates.note_change), OutputWatch(sessions, updates).stop, task_tools.leave)
    return server
