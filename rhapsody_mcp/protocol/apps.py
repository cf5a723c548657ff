"""The page as an MCP App: for clients that show pages, and unseen by all others."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from mcp.server.apps import APP_MIME_TYPE, Apps, ResourceCsp, client_supports_apps
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import Field

from rhapsody_mcp.dashboard.page_text import page_html
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.protocol.dashboard import Dashboard

__all__ = ["PAGE_URI", "REFRESH_TOOL", "Page", "hidden_without_apps"]

PAGE_URI = "ui://rhapsody/dashboard.html"
_PAGE_TOOLS = {"wait_tasks", "get_statistics"}
"""The tools whose calls a client shows with the page."""
REFRESH_TOOL = "dashboard"
"""The page calls this tool twice a second."""


class Page(Apps):
    """The extension with the page as a resource, and the tool with which the page gets its data, which no model is
    offered."""

    def __init__(self, dashboard: Dashboard) -> None:
        super().__init__()
        self._dashboard = dashboard
        self.add_html_resource(
            PAGE_URI,
            page_html("app"),
            name="dashboard",
            title="Dashboard",
            description="The task stream, graph, failures and resources of a session, live.",
            csp=ResourceCsp(),
            prefers_border=True,
        )
        self.tool(
            resource_uri=PAGE_URI,
            visibility=["app"],
            name=REFRESH_TOOL,
            title="Dashboard data",
            description="Data for the dashboard page.",
            annotations=ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
            structured_output=False,
        )(self.dashboard)

    async def dashboard(
        self,
        what: Annotated[str, Field(description="frame, sessions, task, tasks or rows.")],
        query: Annotated[dict[str, str], Field(description="Its fields.")],
    ) -> CallToolResult:
        try:
            if what == "frame":
                data = await self._frame(query)
            else:
                data = await self._dashboard.answer(what, query)
        except RhapsodyError as error:
            raise ToolError(str(error)) from error
        return CallToolResult(content=[TextContent(text="Data for the dashboard page.")], structured_content=data)

    async def _frame(self, query: dict[str, str]) -> dict[str, Any]:
        version = query.get("version", "")
        seen = int(version) if is_index(version) else -1
        frame, cursor, now = await self._dashboard.frame(query.get("session", ""), query.get("cursor", ""), seen)
        return {**msgspec.json.decode(frame), "cursor": str(cursor), "version": now}


async def hidden_without_apps(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Middleware: a client that shows no pages finds neither the page nor its tool in lists. Other clients find the
    page at the tools that it belongs to."""
    result = await call_next(ctx)
    if ctx.method == "tools/list" and isinstance(result, dict):
        shown = _with_page(result["tools"]) if client_supports_apps(ctx) else _without_refresh(result["tools"])
        return {**result, "tools": shown}
    if ctx.method == "resources/list" and isinstance(result, dict) and not client_supports_apps(ctx):
        return {**result, "resources": [one for one in result["resources"] if one.get("mimeType") != APP_MIME_TYPE]}
    return result


def _without_refresh(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [tool for tool in tools if tool["name"] != REFRESH_TOOL]


def _with_page(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    page = {"ui": {"resourceUri": PAGE_URI}}
    return [{**tool, "_meta": tool.get("_meta", {}) | page} if tool["name"] in _PAGE_TOOLS else tool for tool in tools]
