"""Makes the schemas that pydantic writes flat: some hosts refuse a whole list of tools for one nested $ref."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler, StringConstraints, WithJsonSchema
from pydantic_core import CoreSchema

__all__ = ["NAME_PATTERN", "UNTOLD", "Name", "field_at", "field_names", "flat", "read_texts"]

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


NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN), WithJsonSchema({"type": "string"})]
"""What agents may call a session, a task or a function; a refusal says the rule."""


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


def read_texts(schema: Schema, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with lists and objects that came as texts of JSON, as some hosts send them, read."""
    return {name: _read_text(field_at(schema, (name,)), value) for name, value in arguments.items()}


def _read_text(field: Schema, value: Any) -> Any:
    if not isinstance(value, str) or field.get("type") not in ("array", "object"):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, list | dict) else value


def _flat_node(node: Schema, definitions: Schema) -> Schema:
    if "$ref" in node:
        named = definitions[node["$ref"].rpartition("/")[2]]
        node = {**named, **{key: value for key, value in node.items() if key != "$ref"}}
    node = _without_null(node)
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


def _flat_value(key: str, value: Any, definitions: Schema) -> Any:
    if key == "properties":
        return {name: _flat_node(field, definitions) for name, field in value.items()}
    if isinstance(value, dict):
        return _flat_node(value, definitions)
    if isinstance(value, list):
        return [_flat_node(item, definitions) if isinstance(item, dict) else item for item in value]
    return value
