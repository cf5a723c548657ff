"""JSON schemas for the answers of language models."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask

if TYPE_CHECKING:
    from jsonschema_rs import ValidationError, Validator

__all__ = ["SchemaMismatch", "encode_schema", "read_answer"]

_VALID = 'valid is a JSON schema of an object, as in {"type": "object", "properties": {...}, "required": [...]}'
_SHOWN_CHARS = 200
_MAX_BYTES = 64 * 1024
_MAX_PATTERNS = 64
_PATTERNS_BYTES = 4 * 1024**2
"""The limit for all compiled patterns of a schema; it bounds the time of compilation too."""
_REGEX = (
    "valid is a regular expression without look-around and back-references, "
    "whose repeats do not multiply to many thousands"
)


class SchemaMismatch(Exception):
    """An answer does not match the schema; the text says why."""


def encode_schema(schema: object) -> bytes:
    """The schema as JSON, with its keys in their order: a model writes properties in the order of the schema.

    Takes milliseconds at most. Raises InvalidTask for an invalid schema, one that is not of an object, and a large one.
    """
    if not isinstance(schema, dict):
        raise InvalidTask(f"json_schema is a {type(schema).__name__}; {_VALID}.", field="json_schema")
    try:
        encoded = msgspec.json.encode(schema)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidTask(f"json_schema is not plain JSON: {error}.", field="json_schema") from error
    if len(encoded) > _MAX_BYTES:
        raise InvalidTask(
            f"json_schema is {len(encoded):,} bytes as JSON; {_MAX_BYTES:,} is the most.", field="json_schema"
        )
    _validator(encoded)
    return encoded


def read_answer(text: str, schema: bytes) -> Any:
    """The object that a model wrote. Raises SchemaMismatch. The time depends on the schema and on the answer."""
    if not text.strip():
        raise SchemaMismatch("is empty")
    try:
        answer = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise SchemaMismatch(f"is no JSON ({error}). It begins: {_shortened(text)}") from error
    validator = _validator(schema)
    if validator.is_valid(answer):  # unlike `iter_errors`, checks no part twice in a recursive schema
        return answer
    problem = next(validator.iter_errors(answer))
    wrong = f"at {_location(problem)}, {_shortened(problem.message)}"
    raise SchemaMismatch(f"does not fit json_schema: {wrong}. It begins: {_shortened(text)}")


@lru_cache(maxsize=64)
def _validator(encoded: bytes) -> Validator:
    from jsonschema_rs import RegexOptions, ValidationError, validator_for

    schema = msgspec.json.decode(encoded)
    if schema.get("type") != "object":
        has = f"has type {schema['type']!r}" if "type" in schema else "has no type"
        raise InvalidTask(f"json_schema {has}; {_VALID}.", field="json_schema")
    patterns = _count_patterns(schema)
    if patterns > _MAX_PATTERNS:
        raise InvalidTask(f"json_schema has {patterns} patterns; {_MAX_PATTERNS} is the most.", field="json_schema")
    linear = RegexOptions(size_limit=_PATTERNS_BYTES // max(1, patterns))
    try:
        return validator_for(schema, pattern_options=linear, offline=True)
    except ValidationError as error:
        raise InvalidTask(_schema_error_text(error)) from error
    except ValueError as error:
        raise InvalidTask(f"json_schema is nested too deeply: {error}.", field="json_schema") from error


def _count_patterns(schema: Any) -> int:
    """The number of regular expressions, with properties that are named "pattern" or "patternProperties"."""
    count, unvisited = 0, [schema]
    while unvisited:
        part = unvisited.pop()
        if isinstance(part, dict):
            pattern_properties = part.get("patternProperties")
            count += ("pattern" in part) + (len(pattern_properties) if isinstance(pattern_properties, dict) else 0)
            unvisited += part.values()
        elif isinstance(part, list):
            unvisited += part
    return count


def _schema_error_text(error: ValidationError) -> str:
    from jsonschema_rs import ValidationErrorKind

    if isinstance(error.kind, ValidationErrorKind.Referencing):
        return f'json_schema refers to what is not in it: {error.message}. Use "#/$defs/NAME".'
    message = f"json_schema is no JSON schema: at {_location(error)}, {_shortened(error.message)}"
    return f"{message}; {_REGEX}." if error.message.endswith('is not a "regex"') else f"{message}."


def _location(error: ValidationError) -> str:
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
