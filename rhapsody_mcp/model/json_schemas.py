"""JSON schemas that a language model's answers are held to, and what fits them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask

if TYPE_CHECKING:
    from jsonschema_rs import ValidationError, Validator

__all__ = ["Unfit", "encode_schema", "read_answer"]

_VALID = 'valid is a JSON schema of an object, as in {"type": "object", "properties": {...}, "required": [...]}'
_SHOWN_CHARS = 200
_MOST_BYTES = 64 * 1024
_MOST_PATTERNS = 64
_PATTERNS_BYTES = 4 * 1024**2
"""What all patterns of a schema may take once compiled, which is also what bounds the time of compiling them."""
_REGEX = (
    "valid is a regular expression without look-around and back-references, "
    "whose repeats do not multiply to many thousands"
)


class Unfit(Exception):
    """This is not what the schema asks for; the text says what is wrong with it."""


def encode_schema(schema: object) -> bytes:
    """The schema as JSON, its keys in their order: a model writes an object's properties in the order of the schema.

    Takes milliseconds at most. Raises InvalidTask for what is no schema of an object, or is larger than that allows.
    """
    if not isinstance(schema, dict):
        raise InvalidTask(f"json_schema is a {type(schema).__name__}; {_VALID}.")
    try:
        encoded = msgspec.json.encode(schema)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidTask(f"json_schema is not plain JSON: {error}.") from error
    if len(encoded) > _MOST_BYTES:
        raise InvalidTask(f"json_schema is {len(encoded):,} bytes as JSON; {_MOST_BYTES:,} is the most.")
    _validator(encoded)
    return encoded


def read_answer(text: str, schema: bytes) -> Any:
    """The object that a model wrote. Raises Unfit. How long it takes is up to the schema and the model."""
    if not text.strip():
        raise Unfit("is empty")
    try:
        answer = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"is no JSON ({error}). It begins: {_beginning(text)}") from error
    validator = _validator(schema)
    if validator.is_valid(answer):  # which, unlike `iter_errors`, looks at nothing twice where a schema names itself
        return answer
    problem = next(validator.iter_errors(answer))
    wrong = f"at {_place(problem)}, {_beginning(problem.message)}"
    raise Unfit(f"does not fit json_schema: {wrong}. It begins: {_beginning(text)}")


@lru_cache(maxsize=64)
def _validator(encoded: bytes) -> Validator:
    from jsonschema_rs import RegexOptions, ValidationError, validator_for

    schema = msgspec.json.decode(encoded)
    if schema.get("type") != "object":
        has = f"has type {schema['type']!r}" if "type" in schema else "has no type"
        raise InvalidTask(f"json_schema {has}; {_VALID}.")
    patterns = _count_patterns(schema)
    if patterns > _MOST_PATTERNS:
        raise InvalidTask(f"json_schema has {patterns} patterns; {_MOST_PATTERNS} is the most.")
    linear = RegexOptions(size_limit=_PATTERNS_BYTES // max(1, patterns))
    try:
        return validator_for(schema, pattern_options=linear, offline=True)
    except ValidationError as error:
        raise InvalidTask(_explained(error)) from error
    except ValueError as error:
        raise InvalidTask(f"json_schema is nested too deeply: {error}.") from error


def _count_patterns(schema: Any) -> int:
    """How many regular expressions it has; properties of such names count too."""
    count, left = 0, [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            several = part.get("patternProperties")
            count += ("pattern" in part) + (len(several) if isinstance(several, dict) else 0)
            left += part.values()
        elif isinstance(part, list):
            left += part
    return count


def _explained(error: ValidationError) -> str:
    from jsonschema_rs import ValidationErrorKind

    if isinstance(error.kind, ValidationErrorKind.Referencing):
        return f'json_schema refers to what is not in it: {error.message}. Use "#/$defs/NAME".'
    message = f"json_schema is no JSON schema: at {_place(error)}, {_beginning(error.message)}"
    return f"{message}; {_REGEX}." if error.message.endswith('is not a "regex"') else f"{message}."


def _place(error: ValidationError) -> str:
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path)


def _beginning(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
