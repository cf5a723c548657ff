"""Makes the schemas that pydantic writes flat: some hosts refuse a whole list of tools for one nested $ref."""

from __future__ import annotations

import json
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

__all__ = ["UNTOLD", "as_meant", "field_at", "field_names", "flat"]

Schema = dict[str, Any]


class _Untold:
    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return {"type": _without_null(handler(core))["type"]}


UNTOLD = _Untold()
"""For a field of which the schema need only tell the outermost type: its name, the card and the text of the reply say
the rest, and each word of a schema costs every agent."""
_NULL = {"type": "null"}
_SAYS_NOTHING: list[tuple[str, Any]] = [
    ("default", None),
    ("default", False),
    ("additionalProperties", True),
    ("items", {}),
]


def flat(schema: Schema) -> Schema:
    """The same schema without $ref, titles, and null as a choice: an optional field is left out, not null."""
    return _flat_node(schema, schema.get("$defs", {}))


def field_names(schema: Schema, location: tuple[int | str, ...]) -> list[str]:
    """The fields that a flat schema knows in the object at `location`."""
    return list(field_at(schema, location).get("properties", {}))


def field_at(schema: Schema, location: tuple[int | str, ...]) -> Schema:
    """What a flat schema says of the value at `location`; empty where it says nothing."""
    for step in location:
        if isinstance(step, int):
            schema = schema.get("items", {})
        else:
            schema = schema.get("properties", {}).get(step) or schema.get("additionalProperties") or {}
    return schema


def as_meant(schema: Schema, value: Any) -> Any:
    """The value as the flat schema has it, where it is clear what is meant.

    null is absent, a lone text or object stands for a list of one, a choice may be in any letter case, and lists and
    objects that came as texts of JSON, as some hosts send them, are read. What the schema says nothing of stays.
    """
    if (types := _types(schema)) & {"array", "object"} and "string" not in types:
        value = _listed(schema, _read_text(value))
    if isinstance(value, list) and "items" in schema:
        return [as_meant(schema["items"], item) for item in value]
    if isinstance(value, dict) and (fields := schema.get("properties")) is not None:
        return {name: as_meant(fields.get(name, {}), part) for name, part in value.items() if part is not None}
    if isinstance(value, str) and value not in (choices := schema.get("enum", [value])):
        return next((choice for choice in choices if choice.casefold() == value.casefold()), value)
    return value


def _types(schema: Schema) -> set[str]:
    kind = schema.get("type", ())
    return {kind} if isinstance(kind, str) else set(kind)


def _read_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, list | dict) else value


def _listed(schema: Schema, value: Any) -> Any:
    kind = "string" if isinstance(value, str) else "object" if isinstance(value, dict) else None
    return [value] if kind and kind == schema.get("items", {}).get("type") else value


def _flat_node(node: Schema, definitions: Schema) -> Schema:
    if "$ref" in node:
        named = definitions[node["$ref"].rpartition("/")[2]]
        node = {**named, **{key: value for key, value in node.items() if key != "$ref"}}
    node = _with_types(_without_null(node))
    return {
        key: _flat_value(key, value, definitions)
        for key, value in node.items()
        if key not in ("title", "$defs") and not _says_nothing(key, value)
    }


def _says_nothing(key: str, value: Any) -> bool:
    return any(key == idle_key and value == idle and type(value) is type(idle) for idle_key, idle in _SAYS_NOTHING)


def _without_null(node: Schema) -> Schema:
    choices = node.get("anyOf", [])
    if _NULL not in choices:
        return node
    left = [choice for choice in choices if choice != _NULL]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return {**left[0], **rest} if len(left) == 1 else {**rest, "anyOf": left}


def _with_types(node: Schema) -> Schema:
    """With a list of types in the place of choices that differ in their type: fewer words for the same."""
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
