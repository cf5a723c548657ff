"""The schemas of the tools stay inside what each provider of models takes, and what each client keeps of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SNAPSHOTS = sorted((Path(__file__).parent / "snapshots").glob("*.json"))
GEMINI = {
    *("type", "format", "title", "description", "enum", "items", "prefixItems", "minItems", "maxItems", "minimum"),
    *("maximum", "anyOf", "oneOf", "properties", "additionalProperties", "required", "$id", "$defs", "$ref", "$anchor"),
}
"""Of a `parametersJsonSchema`: https://ai.google.dev/api/generate-content, under responseJsonSchema."""
GEMINI_PARAMETERS = {
    *("type", "format", "title", "description", "nullable", "enum", "maxItems", "minItems", "properties", "required"),
    *("minProperties", "maxProperties", "minLength", "maxLength", "pattern", "example", "anyOf", "propertyOrdering"),
    *("default", "items", "minimum", "maximum"),
}
"""Of `parameters`: https://ai.google.dev/api/caching#Schema."""
OPENAI = {
    *("type", "description", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items"),
    *("pattern", "format", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    *("minItems", "maxItems", "$defs", "$ref"),
}
"""https://platform.openai.com/docs/guides/structured-outputs#supported-schemas"""
LONGEST_NAME = 64
"""Of OpenAI and Gemini; a host puts its own name of the server before it, such as mcp__rhapsody__."""
SEVERAL_TYPES = {
    *("prompt", "system_prompt", "model", "temperature", "max_tokens", "top_p", "top_k", "seed", "n", "logprobs"),
    *("stop_sequences", "for_each"),
}
"""Fields of a task that are a value or a reference to a result: one type would hide the other."""


def nodes(schema: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema in a schema, after the name of its property; `name[]` for the items of an array."""
    yield name, schema
    for field, inner in schema.get("properties", {}).items():
        yield from nodes(inner, field)
    if "items" in schema:
        yield from nodes(schema["items"], f"{name}[]")


@pytest.fixture(params=SNAPSHOTS, ids=lambda path: path.stem)
def tool(request: pytest.FixtureRequest) -> dict[str, Any]:
    tool: dict[str, Any] = json.loads(request.param.read_text())
    return tool


def types(schema: dict[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def test_only_keywords_are_used_that_all_providers_take(tool: dict[str, Any]) -> None:
    for name, schema in nodes(tool["inputSchema"], tool["name"]):
        assert schema.keys() <= GEMINI & GEMINI_PARAMETERS & OPENAI, name


def test_each_value_has_a_type_and_each_array_says_what_it_holds(tool: dict[str, Any]) -> None:
    for name, schema in nodes(tool["inputSchema"], tool["name"]):
        assert types(schema) or (name.endswith("[]") and not schema), name
        assert "array" not in types(schema) or "items" in schema, name
        assert all(isinstance(choice, str) for choice in schema.get("enum", [])), name


def test_a_parameter_has_one_type_which_is_all_that_some_clients_keep(tool: dict[str, Any]) -> None:
    for name, schema in tool["inputSchema"]["properties"].items():
        assert isinstance(schema["type"], str), name
    several = {name for name, schema in nodes(tool["inputSchema"], "") if len(types(schema)) > 1}
    assert several == (SEVERAL_TYPES if tool["name"] == "submit_tasks" else set())


def test_a_name_leaves_room_for_that_of_the_server(tool: dict[str, Any]) -> None:
    assert len(f"mcp__rhapsody-mcp-server__{tool['name']}") <= LONGEST_NAME
