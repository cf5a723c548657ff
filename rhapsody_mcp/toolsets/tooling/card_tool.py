"""Turns a toolset's methods into tools, each described by its card."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp.types import ToolAnnotations
from pydantic import Field, ValidationError

from rhapsody_mcp.cards import Card
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.toolsets.tooling.argument_errors import (
    invalid_arguments_text,
    unknown_argument_text,
    unreadable_argument_text,
)
from rhapsody_mcp.toolsets.tooling.background import measure_call, to_thread_if_large
from rhapsody_mcp.toolsets.tooling.errors import error_text, internal_error_text, invalid_answer_text
from rhapsody_mcp.toolsets.tooling.schemas import brief, coerced, flat

__all__ = ["CardTool", "make_tools"]


class _ValidArguments(dict[str, Any]):
    """Arguments after validation."""


class _UnparsedArguments(FuncMetadata):
    """Takes texts as texts; its base class reads a text such as `null` or `[a]` as JSON."""

    def pre_parse_json(self, data: dict[str, Any]) -> dict[str, Any]:
        return data

    def validate_arguments(self, arguments_to_validate: dict[str, Any]) -> dict[str, Any]:
        if isinstance(arguments_to_validate, _ValidArguments):
            return arguments_to_validate
        return super().validate_arguments(arguments_to_validate)


class CardTool(Tool):
    """A tool whose every error is a text that the model can act on.

    `checked` is the schema of the arguments with everything that is checked; `parameters`, which the model reads, has
    less.
    """

    checked: dict[str, Any] = Field(default_factory=dict)

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        measure_call(arguments)
        valid = await to_thread_if_large(self._validated, arguments)
        try:
            return await super().run(valid, context, convert_result)
        except ToolError as error:
            raise self._for_model(error) from error.__cause__

    def _validated(self, arguments: dict[str, Any]) -> _ValidArguments:
        values = coerced(self.checked, arguments)
        wrong = unknown_argument_text(values, self.checked, self.name) or unreadable_argument_text(values, self.name)
        if wrong:
            raise ToolError(wrong)
        try:
            return _ValidArguments(self.fn_metadata.validate_arguments(values))
        except ValidationError as error:
            raise ToolError(invalid_arguments_text(error, self.checked, values, self.name)) from error

    def _for_model(self, error: ToolError) -> ToolError:
        match error.__cause__:
            case RhapsodyError() as cause:
                return ToolError(error_text(cause, self.name))
            case ToolError():
                return ToolError(invalid_answer_text(self.name))
        return UnexpectedToolError(internal_error_text(self.name))


def make_tools(toolsets: Iterable[object], cards: Iterable[Card]) -> list[Tool]:
    """A tool for each public method of each toolset, in the order of their definition.

    Raises RhapsodyError where a method has no card or a card no method.
    """
    unused = {(card.toolset, card.name): card for card in cards}
    tools: list[Tool] = []
    for toolset in toolsets:
        folder = type(toolset).__name__.lower()
        for name in _methods(toolset):
            card = unused.pop((folder, name), None)
            if card is None:
                raise RhapsodyError(f"the tool {name} has no card: write tools/{folder}/{name}.md.")
            tools.append(_make_tool(getattr(toolset, name), card))
    for folder, name in unused:
        raise RhapsodyError(f"the card tools/{folder}/{name}.md has no tool: write the method, or delete the card.")
    return tools


def _methods(toolset: object) -> list[str]:
    members = vars(type(toolset))
    return [name for name in members if not name.startswith("_") and inspect.isfunction(members[name])]


def _make_tool(method: Any, card: Card) -> Tool:
    tool = CardTool.from_function(method, title=card.title, description=card.text, annotations=_annotations(card))
    tool.fn_metadata = _UnparsedArguments(**dict(tool.fn_metadata))
    checked = {**flat(tool.parameters), "additionalProperties": False}
    tool = tool.model_copy(update={"checked": checked, "parameters": brief(checked)})
    if tool.fn_metadata.output_schema is not None:
        tool.fn_metadata.output_schema = flat(tool.fn_metadata.output_schema)
    return tool


def _annotations(card: Card) -> ToolAnnotations:
    hints = card.annotations
    return ToolAnnotations(
        read_only_hint=hints.read_only,
        destructive_hint=hints.destructive,
        idempotent_hint=hints.idempotent,
        open_world_hint=hints.open_world,
    )
