"""MCP prompts from the texts in prompts/."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from mcp import MCPError
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.prompts import Prompt
from mcp.server.mcpserver.prompts.base import Message, PromptArgument, UserMessage
from mcp.types import INVALID_PARAMS

from rhapsody_mcp.cards import PromptText
from rhapsody_mcp.model.errors import InvalidRequest, RhapsodyError, UnknownName
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.toolsets.tooling.errors import error_text

__all__ = ["make_prompt", "refuse_prompt"]


class TextPrompt(Prompt):
    """A prompt that refuses wrong arguments with a text for people."""

    async def render(self, arguments: dict[str, Any] | None, context: Context[Any, Any]) -> list[Message]:
        try:
            return [UserMessage(cast(str, self.fn(arguments or {})))]
        except RhapsodyError as error:
            raise refuse_prompt(error) from error


def make_prompt(prompt: PromptText, sessions: SessionRegistry) -> Prompt:
    """A prompt; values of its arguments `session` and `task` must exist."""
    return TextPrompt(
        name=prompt.name,
        title=prompt.title,
        description=prompt.description,
        arguments=[
            PromptArgument(name=argument.name, description=argument.description, required=argument.required)
            for argument in prompt.arguments
        ],
        fn=partial(_fill, prompt, sessions),
        context_kwarg=None,
    )


def refuse_prompt(error: RhapsodyError) -> MCPError:
    return MCPError(INVALID_PARAMS, error_text(error, "prompts/get"))


def _fill(prompt: PromptText, sessions: SessionRegistry, values: Mapping[str, str]) -> str:
    known = [argument.name for argument in prompt.arguments]
    for name in values:
        if name not in known:
            raise UnknownName("argument", name, known)
    for argument in prompt.arguments:
        if argument.required and not values.get(argument.name, "").strip():
            raise InvalidRequest(f"{prompt.name} needs {argument.name}: {argument.description}")
    if session := values.get("session"):
        opened = sessions.get(session)
        opened.tasks([task] if (task := values.get("task")) else [])
    return prompt.filled(values)
