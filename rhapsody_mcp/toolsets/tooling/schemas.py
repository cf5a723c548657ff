"""JSON schemas without $ref, as some hosts refuse the whole list of tools for one nested $ref."""

from __future__ import annotations

import json
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

__all__ = ["TYPE_ONLY", "brief", "coerced", "field_at", "field_names", "flat"]

Schema = dict[str, Any]


class _TypeOnly:
    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return {"type": _without_null(handler(core))["type"]}


TYPE_ONLY = _TypeOnly()
"""Marks a field whose schema is its outermost type alone: the name of the field, the card and the reply tell the
rest, and each word of a schema costs tokens."""
_NULL = {"type": "null"}
_DEFAULTS: list[tuple[str, Any]] = [
    ("default", None),
    ("default", False),
    ("additionalProperties", True),
]


def flat(schema: Schema) -> Schema:
    """The same schema without $ref, titles and the choice of null: a caller leaves an optional field out."""
    return _flat_node(schema, schema.get("$defs", {}))


def brief(schema: Schema) -> Schema:
    """The same flat schema without bounds and defaults, which an error names: each word of a schema costs tokens."""
    return {
        key: {name: brief(field) for name, field in value.items()}
        if key == "properties"
        else brief(value)
        if isinstance(value, dict)
        else value
        for key, value in schema.items()
        if key not in _BOUNDS
    }


_BOUNDS = {
    *(
        "additionalProperties",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "minLength",
        "maxLength",
        "pattern",
        "minItems",
        "minProperties",
    ),
    "default",
}


def field_names(schema: Schema, location: tuple[int | str, ...]) -> list[str]:
    """The fields of the object at `location` in a flat schema."""
    return list(field_at(schema, location).get("properties", {}))


def field_at(schema: Schema, location: tuple[int | str, ...]) -> Schema:
    """The schema of the value at `location` in a flat schema; empty where there is none."""
    for step in location:
        if isinstance(step, int):
            schema = schema.get("items", {})
        else:
            schema = schema.get("properties", {}).get(step) or schema.get("additionalProperties") or {}
    return schema


def coerced(schema: Schema, value: Any) -> Any:
    """The value in the form that the flat schema asks for, where the meaning is clear.

    A field that is null is left out, a single text or object becomes a list of one, a choice may be in any letter case,
    and lists and objects that a host sent as JSON texts are parsed. Parts that the schema does not describe stay.
    """
    if (types := _types(schema)) & {"array", "object"} and "string" not in types:
        value = _as_list(schema, _parsed(value))
    if isinstance(value, list) and "items" in schema:
        return [coerced(schema["items"], item) for item in value]
    if isinstance(value, dict) and (fields := schema.get("properties")) is not None:
        return {name: coerced(fields.get(name, {}), part) for name, part in value.items() if part is not None}
    if isinstance(value, str) and value not in (choices := schema.get("enum", [value])):
        return next((choice for choice in choices if choice.casefold() == value.casefold()), value)
    return value


def _types(schema: Schema) -> set[str]:
    kind = schema.get("type", ())
    return {kind} if isinstance(kind, str) else set(kind)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, list | dict) else value


def _as_list(schema: Schema, value: Any) -> Any:
    kind = "string" if isinstance(value, str) else "object" if isinstance(value, dict) else None
    return [value] if kind and kind == schema.get("items", {}).get("type") else value


def _flat_node(node: Schema, definitions: Schema) -> Schema:
    if "$ref" in node:
        definition = definitions[node["$ref"].rpartition("/")[2]]
        node = {**definition, **{key: value for key, value in node.items() if key != "$ref"}}
    node = _with_types(_without_null(node))
    if "const" in node:  # Gemini has no const, and refuses an array without items, as OpenAI does
        node = {**{key: value for key, value in node.items() if key != "const"}, "enum": [node["const"]]}
    if "array" in _types(node):
        node = {"items": {}, **node}
    return {
        key: _flat_value(key, value, definitions)
        for key, value in node.items()
        if key not in ("title", "$defs") and not _is_default(key, value)
    }


def _is_default(key: str, value: Any) -> bool:
    return any((key, value) == (name, default) and type(value) is type(default) for name, default in _DEFAULTS)


def _without_null(node: Schema) -> Schema:
    choices = node.get("anyOf", [])
    if _NULL not in choices:
        return node
    others = [choice for choice in choices if choice != _NULL]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return {**others[0], **rest} if len(others) == 1 else {**rest, "anyOf": others}


def _with_types(node: Schema) -> Schema:
    """The node with a list of types in place of choices that differ only in their type, which is shorter."""
    name = "oneOf" if "oneOf" in node else "anyOf"
    choices = node.get(name, [])
    types = [choice.get("type") for choice in choices]
    if not choices or not all(isinstance(kind, str) for kind in types) or len(set(types)) < len(types):
        return node
    rest = {key: value for key, value in node.items() if key != name}
    limits = {key: value for choice in choices for key, value in choice.items()}
    return {**rest, **limits, "type": types}


def _flat_value(key: str, value: Any, definitions: Schema) -> Any:
    if key == "properties":
        return {name: _flat_node(field, definitions) for name, field in value.items()}
    if isinstance(value, dict):
        return _flat_node(value, definitions)
    if isinstance(value, list):
        return [_flat_node(item, definitions) if isinstance(item, dict) else item for item in value]
    return value
