"""The tools that the conformance suite's `tasks-*` scenarios call by name."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
from mcp import MCPError
from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve, require_client_extension
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import INTERNAL_ERROR, ElicitRequest, ElicitRequestFormParams
from pydantic import BaseModel

from rhapsody_mcp.protocol.tasks_extension import TASKS
from rhapsody_mcp.toolsets.tooling.deferred import ask_later, defer

__all__ = ["add_task_tools"]

_WORK_S = 1.0


class UserName(BaseModel):
    name: str


def add_task_tools(server: MCPServer[Any]) -> None:
    """The server has the Tasks extension."""
    for tool in (
        *(greet, slow_compute, failing_job, protocol_error_job),
        *(confirm_delete, multi_input, test_tool_with_task),
    ):
        server.add_tool(tool, description="For the suite.")


async def greet(name: str) -> str:
    return f"Hello, {name}!"


async def slow_compute(seconds: float, label: str = "") -> str:
    if seconds:
        defer()
    await anyio.sleep(seconds)
    return f"computed {label}"


async def failing_job(context: Context[Any, Any]) -> str:
    require_client_extension(context.request_context, TASKS)
    defer()
    await anyio.sleep(_WORK_S)
    raise ToolError("the job failed")


async def protocol_error_job() -> str:
    defer()
    await anyio.sleep(_WORK_S)
    raise MCPError(code=INTERNAL_ERROR, message="the server failed")


async def confirm_delete(filename: str) -> str:
    answers = await ask_later({"confirm": _question(f"Delete {filename}?", "confirm", "boolean")})
    return f"{filename}: {answers['confirm']['action']}"


async def multi_input() -> str:
    answers = await ask_later(
        {"name": _question("Your name?", "name", "string"), "sure": _question("Sure?", "confirm", "boolean")}
    )
    return ", ".join(f"{key}: {answer['action']}" for key, answer in answers.items())


async def _ask_name() -> Elicit[UserName]:
    return Elicit("Your name?", UserName)


async def test_tool_with_task(context: Context[Any, Any], user: Annotated[UserName, Resolve(_ask_name)]) -> str:
    require_client_extension(context.request_context, TASKS)
    defer()
    await anyio.lowlevel.checkpoint()
    return f"Hello, {user.name}!"


test_tool_with_task.__test__ = False  # type: ignore[attr-defined]  # the suite names it, pytest must not run it


def _question(message: str, field: str, kind: str) -> ElicitRequest:
    schema = {"type": "object", "properties": {field: {"type": kind}}, "required": [field]}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))
