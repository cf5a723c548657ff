"""Makes the schemas that pydantic writes flat: some hosts refuse a whole list of tools for one nested $ref."""

from __future__ import annotations

from typing import Any

from pydantic import WithJsonSchema

__all__ = ["UNTOLD", "field_names", "flat"]

UNTOLD = WithJsonSchema({})
"""For a field whose type the schema need not pay for: its name, the card and the text of the reply say what it is."""

Schema = dict[str, Any]
_NULL = {"type": "null"}
_SAYS_NOTHING = [("default", None), ("default", False), ("additionalProperties", True)]


def flat(schema: Schema) -> Schema:
    """The same schema without $ref, titles, and null as a choice: an optional field is left out, not null."""
    return _flat_node(schema, schema.get("$defs", {}))


def field_names(schema: Schema, location: tuple[int | str, ...]) -> list[str]:
    """The fields that a flat schema knows in the object at `location`."""
    for step in location:
        schema = schema.get("items", {}) if isinstance(step, int) else schema.get("properties", {}).get(step, {})
    return list(schema.get("properties", {}))


def _flat_node(node: Schema, definitions: Schema) -> Schema:
    if "$ref" in node:
        named = definitions[node["$ref"].rpartition("/")[2]]
        node = {**named, **{key: value for key, value in node.items() if key != "$ref"}}
    node = _without_null(node)
    return {
        key: _flat_value(key, value, definitions)
        for key, value in node.items()
        if key not in ("title", "$defs") and (key, value) not in _SAYS_NOTHING
    }


def _without_null(node: Schema) -> Schema:
    choices = node.get("anyOf", [])
    if _NULL not in choices:
        return node
    left = [choice for choice in choices if choice != _NULL]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return {**left[0], **rest} if len(left) == 1 else {**rest, "anyOf": left}


def _flat_value(key: str, value: Any, definitions: Schema) -> Any:
    if key == "properties":
        return {name: _flat_node(field, definitions) for name, field in value.items()}
    if isinstance(value, dict):
        return _flat_node(value, definitions)
    if isinstance(value, list):
        return [_flat_node(item, definitions) if isinstance(item, dict) else item for item in value]
    return value
