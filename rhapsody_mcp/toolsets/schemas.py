"""Makes the schemas that pydantic writes flat: some hosts refuse a whole list of tools for one nested $ref."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler, StringConstraints, WithJsonSchema
from pydantic_core import CoreSchema

__all__ = ["NAME_PATTERN", "UNTOLD", "Name", "as_meant", "field_at", "field_names", "flat"]

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


def as_meant(schema: Schema, value: Any) -> Any:
    """The value as the flat schema has it, where it is clear what is meant.

    null is absent, a lone text or object stands for a list of one, a choice may be in any letter case, and lists and
    objects that came as texts of JSON, as some hosts send them, are read. What the schema says nothing of stays.
    """
    if schema.get("type") in ("array", "object"):
        value = _listed(schema, _read_text(value))
    if isinstance(value, list) and "items" in schema:
        return [as_meant(schema["items"], item) for item in value]
    if isinstance(value, dict) and (fields := schema.get("properties")) is not None:
        return {name: as_meant(fields.get(name, {}), part) for name, part in value.items() if part is not None}
    if isinstance(value, str) and value not in (choices := schema.get("enum", [value])):
        return next((choice for choice in choices if choice.casefold() == value.casefold()), value)
    return value


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
