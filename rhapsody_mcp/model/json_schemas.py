"""JSON schemas that a language model's answers are held to, and what fits them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

__all__ = ["Unfit", "encode_schema", "read_answer"]

_VALID = 'valid is a JSON schema of an object, as in {"type": "object", "properties": {...}, "required": [...]}'
_SHOWN_CHARS = 200


class Unfit(Exception):
    """This is not what the schema asks for; the text says what is wrong with it."""


def encode_schema(schema: object) -> bytes:
    """The schema as JSON, its keys in their order: a model writes an object's properties in the order of the schema.

    Raises InvalidTask for what is no schema of an object.
    """
    if not isinstance(schema, dict):
        raise InvalidTask(f"json_schema is a {type(schema).__name__}; {_VALID}.")
    try:
        encoded = msgspec.json.encode(schema)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidTask(f"json_schema is not plain JSON: {error}.") from error
    _validator(encoded)
    return encoded


def read_answer(text: str, schema: bytes) -> Any:
    """The object that a model wrote. Raises Unfit, or InvalidTask where the schema refers to what it does not hold."""
    from referencing.exceptions import Unresolvable

    if not text.strip():
        raise Unfit("is empty")
    try:
        answer = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"is no JSON ({error}). It begins: {_beginning(text)}") from error
    try:
        problem = next(iter(_validator(schema).iter_errors(answer)), None)
    except Unresolvable as error:
        raise InvalidTask(f'json_schema refers to {error.ref}, which is not in it; use "#/$defs/NAME".') from error
    if problem is not None:
        wrong = f"at {problem.json_path}, {_beginning(problem.message)}"
        raise Unfit(f"does not fit json_schema: {wrong}. It begins: {_beginning(text)}")
    return answer


@lru_cache(maxsize=64)
def _validator(encoded: bytes) -> Validator:
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = msgspec.json.decode(encoded)
    if schema.get("type") != "object":
        has = f"has type {schema['type']!r}" if "type" in schema else "has no type"
        raise InvalidTask(f"json_schema {has}; {_VALID}.")
    dialect = schema if isinstance(schema.get("$schema"), str) else {}
    kind = validator_for(dialect, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        message = f"json_schema is no JSON schema: at {error.json_path}, {_beginning(error.message)}."
        raise InvalidTask(message) from error
    return kind(schema, registry=Registry())  # an empty one, so that nothing is fetched from elsewhere


def _beginning(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
