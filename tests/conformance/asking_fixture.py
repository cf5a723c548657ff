"""The tools and the prompt of the conformance suite that ask the client, in the way of each era."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcp import MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp.types import (
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    CreateMessageRequest,
    CreateMessageRequestParams,
    ElicitRequest,
    ElicitRequestFormParams,
    InputRequiredResult,
    ListRootsRequest,
    SamplingMessage,
    TextContent,
)

__all__ = ["add_asking"]

Asking = Context[Any, Any]
Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_TITLED = [{"const": f"value{n}", "title": f"{nth} choice"} for n, nth in enumerate(("First", "Second", "Third"), 1)]


def add_asking(server: MCPServer[Any]) -> None:
    tools: list[Callable[..., Any]] = [_sampling, _elicitation, _elicitation_sep1034_defaults]
    tools += [_elicitation_sep1330_enums, _missing_capability, _trigger_tool_change, _trigger_prompt_change]
    for tool in [*tools, _streaming_elicitation]:
        _add(server, tool)
    for ask in (
        _elicitation_input,
        _sampling_input,
        _list_roots,
        _request_state,
        _multiple_inputs,
        _multi_round,
        _tampered_state,
        _capabilities,
    ):
        name = ask.__name__.removesuffix("_input")
        _add(server, ask, f"test_input_required_result{name}")
    server.prompt("test_input_required_result_prompt", description="Asks for its context.")(_prompt)


def _add(server: MCPServer[Any], tool: Callable[..., Any], name: str = "") -> None:
    server.add_tool(tool, name=name or f"test{tool.__name__}", description="For the suite.", structured_output=False)


# --- up to 2025-11-25: a request to the client


async def _ask(context: Asking, message: str, properties: Schema, required: list[str]) -> str:
    schema = {"type": "object", "properties": properties, "required": required}
    answer = await context.session.elicit(message, schema, related_request_id=context.request_id)
    return f"Elicitation completed: action={answer.action}, content={answer.content}"


async def _sampling(context: Asking, prompt: str) -> str:
    message = SamplingMessage(role="user", content=TextContent(text=prompt))
    answer = await context.session.create_message([message], max_tokens=100, related_request_id=context.request_id)
    return f"LLM response: {answer.content}"


async def _elicitation(context: Asking, message: str) -> str:
    return await _ask(context, message, {"username": _TEXT, "email": _TEXT}, ["username", "email"])


async def _elicitation_sep1034_defaults(context: Asking) -> str:
    properties = {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
        "verified": {"type": "boolean", "default": True},
    }
    return await _ask(context, "Who are you?", properties, [])


async def _elicitation_sep1330_enums(context: Asking) -> str:
    options = ["option1", "option2", "option3"]
    properties = {
        "untitledSingle": {"type": "string", "enum": options},
        "titledSingle": {"type": "string", "oneOf": _TITLED},
        "legacyEnum": {"type": "string", "enum": options, "enumNames": ["One", "Two", "Three"]},
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": options}},
        "titledMulti": {"type": "array", "items": {"anyOf": _TITLED}},
    }
    return await _ask(context, "Which of them?", properties, [])


# --- from 2026-07-28 on: a result that says what is missing


def _form(message: str, **properties: Schema) -> ElicitRequest:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def _sample(text: str, max_tokens: int) -> CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(text=text))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=max_tokens))


_NAME = _form("What is your name?", name=_TEXT)


def _asked(
    context: Asking, requests: dict[str, Any], answer: str = "Thank you.", state: str | None = None
) -> str | InputRequiredResult:
    """The answer, once each request was answered and the state came back."""
    answers = context.input_responses or {}
    if set(requests) <= set(answers) and context.request_state == state:
        return answer.format(*answers.values())
    return InputRequiredResult(input_requests=requests, request_state=state)


def _elicitation_input(context: Asking) -> str | InputRequiredResult:
    return _asked(context, {"user_name": _NAME}, "Hello, {0.content[name]}!")


def _sampling_input(context: Asking) -> str | InputRequiredResult:
    return _asked(context, {"capital_question": _sample("What is the capital of France?", 100)}, "{0.content.text}")


def _list_roots(context: Asking) -> str | InputRequiredResult:
    return _asked(context, {"client_roots": ListRootsRequest()}, "{0.roots}")


def _request_state(context: Asking) -> str | InputRequiredResult:
    return _asked(context, {"confirm": _form("Please confirm", ok={"type": "boolean"})}, "state-ok", "asked")


def _tampered_state(context: Asking) -> str | InputRequiredResult:
    return _asked(context, {"confirm": _form("Please confirm", ok={"type": "boolean"})}, "integrity-ok", "asked")


def _multiple_inputs(context: Asking) -> str | InputRequiredResult:
    requests = {"user_name": _NAME, "greeting": _sample("Generate a greeting", 50), "client_roots": ListRootsRequest()}
    return _asked(context, requests, state="asked")


def _multi_round(context: Asking) -> str | InputRequiredResult:
    if context.request_state is None:
        first = _form("Step 1: What is your name?", name=_TEXT)
        return InputRequiredResult(input_requests={"step1": first}, request_state="first")
    second = _form("Step 2: What is your favorite color?", color=_TEXT)
    return _asked(context, {"step2": second}, "{0.content[color]}", "second")


def _capabilities(context: Asking) -> str | InputRequiredResult:
    """Only what the client says that it can be asked."""
    can = context.client_capabilities
    requests: dict[str, Any] = {}
    if can and can.elicitation:
        requests["user_name"] = _NAME
    if can and can.sampling:
        requests["greeting"] = _sample("Generate a greeting", 50)
    return _asked(context, requests)


def _streaming_elicitation(context: Asking) -> str | InputRequiredResult:
    return _asked(context, {"user_name": _NAME})


def _prompt(context: Asking) -> Any:
    return _asked(context, {"user_context": _form("What context should the prompt use?", context=_TEXT)})


def _missing_capability() -> str:
    needed: dict[str, Any] = {"requiredCapabilities": {"sampling": {}}}
    raise MCPError(MISSING_REQUIRED_CLIENT_CAPABILITY, "The client cannot sample.", needed)


async def _trigger_tool_change(context: Asking) -> str:
    await context.notify_tools_changed()
    return "Told."


async def _trigger_prompt_change(context: Asking) -> str:
    await context.notify_prompts_changed()
    return "Told."
