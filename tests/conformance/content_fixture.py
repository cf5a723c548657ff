"""The tools, resources and prompts that the conformance suite reads by name, and what of them it asks of a server."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

import anyio
from mcp.server.lowlevel import Server as LowLevelServer
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.server.mcpserver.tools import Tool
from mcp.types import (
    AudioContent,
    CompleteRequestParams,
    CompleteResult,
    Completion,
    ContentBlock,
    EmbeddedResource,
    EmptyResult,
    ImageContent,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    TextResourceContents,
    UnsubscribeRequestParams,
)
from pydantic import Field

__all__ = ["add_content"]

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
_SILENCE = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAA="
_STEP_S = 0.05
_SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
Asking = Context[Any, Any]


def add_content(server: MCPServer[Any]) -> None:
    for name, answer in _CONTENT.items():
        server.add_tool(_giving(answer), name=name, description="Gives fixed content.", structured_output=False)
    for tool in (
        _error_handling,
        _tool_with_logging,
        _logging_tool,
        _tool_with_progress,
        _reconnection,
        _custom_header,
    ):
        server.add_tool(tool, name=f"test{tool.__name__}", description="For the suite.", structured_output=False)
    _add_tool_with_schema(server)
    _add_resources(server)
    _add_prompts(server)
    _add_endpoints(server._lowlevel_server)


def _resource(uri: str, text: str, kind: str = "text/plain") -> EmbeddedResource:
    return EmbeddedResource(resource=TextResourceContents(uri=uri, mime_type=kind, text=text))


_IMAGE = ImageContent(data=_PIXEL, mime_type="image/png")
_CONTENT: dict[str, list[ContentBlock]] = {
    "test_simple_text": [TextContent(text="This is a simple text response for testing.")],
    "test_image_content": [_IMAGE],
    "test_audio_content": [AudioContent(data=_SILENCE, mime_type="audio/wav")],
    "test_embedded_resource": [_resource("test://embedded-resource", "This is an embedded resource content.")],
    "test_multiple_content_types": [
        TextContent(text="Multiple content types test:"),
        _IMAGE,
        _resource("test://mixed-content-resource", json.dumps({"test": "data", "value": 123}), "application/json"),
    ],
}


def _giving(answer: list[ContentBlock]) -> Any:
    def give() -> list[ContentBlock]:
        return answer

    return give


def _error_handling() -> str:
    raise ToolError("This tool intentionally returns an error for testing")


async def _tool_with_logging(context: Asking) -> str:
    for event in ("started", "processing data", "completed"):
        await context.info(f"Tool execution {event}")
        await anyio.sleep(_STEP_S)
    return "Logged."


async def _logging_tool(context: Asking) -> str:
    await context.info("For those who asked to hear it.")
    return "Logged."


async def _tool_with_progress(context: Asking) -> str:
    for done in (0, 50, 100):
        await context.report_progress(done, 100, f"{done} of 100")
        await anyio.sleep(_STEP_S)
    return "Done."


async def _reconnection(context: Asking) -> str:
    """Where the server cannot resume a stream, it has nothing to close."""
    await context.close_sse_stream()
    await anyio.sleep(_STEP_S)
    return "Done."


def _custom_header(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})]) -> str:
    return region


def _add_tool_with_schema(server: MCPServer[Any]) -> None:
    tool = Tool.from_function(lambda: "Done.", name="json_schema_2020_12_tool", description="Its schema is the point.")
    tool.parameters = _SCHEMA
    server._tool_manager._tools[tool.name] = tool


def _add_resources(server: MCPServer[Any]) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    def static_binary() -> bytes:
        return base64.b64decode(_PIXEL)

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


def _add_prompts(server: MCPServer[Any]) -> None:
    @server.prompt(description="Has no arguments.")
    def test_simple_prompt() -> str:
        return "This is a simple prompt for testing."

    @server.prompt(description="Has two arguments.")
    def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
        return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"

    @server.prompt(description="Holds a resource.")
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
        resource = _resource(resourceUri, "Embedded resource content for testing.")
        return [UserMessage(resource), UserMessage("Please process the embedded resource above.")]

    @server.prompt(description="Holds an image.")
    def test_prompt_with_image() -> list[UserMessage]:
        return [UserMessage(_IMAGE), UserMessage("Please analyze the image above.")]


def _add_endpoints(server: LowLevelServer[Any]) -> None:
    """What the suite asks of its own names goes to our handlers as if it were of ours."""
    complete = server.get_request_handler("completion/complete")
    subscribe = server.get_request_handler("resources/subscribe")
    unsubscribe = server.get_request_handler("resources/unsubscribe")
    assert complete and subscribe and unsubscribe

    async def on_complete(context: Any, params: CompleteRequestParams) -> Any:
        if getattr(params.ref, "name", "") == "test_prompt_with_arguments":
            return CompleteResult(completion=Completion(values=[]))
        return await complete.handler(context, params)

    async def on_subscribe(context: Any, params: SubscribeRequestParams) -> Any:
        return await subscribe.handler(context, params.model_copy(update={"uri": _watched(params.uri)}))

    async def on_unsubscribe(context: Any, params: UnsubscribeRequestParams) -> Any:
        return await unsubscribe.handler(context, params.model_copy(update={"uri": _watched(params.uri)}))

    async def on_level(_: Any, __: SetLevelRequestParams) -> EmptyResult:
        return EmptyResult()

    server.add_request_handler("completion/complete", CompleteRequestParams, on_complete)
    server.add_request_handler("resources/subscribe", SubscribeRequestParams, on_subscribe)
    server.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, on_unsubscribe)
    server.add_request_handler("logging/setLevel", SetLevelRequestParams, on_level)


def _watched(uri: str) -> str:
    return "rhapsody://sessions" if uri == "test://watched-resource" else uri
