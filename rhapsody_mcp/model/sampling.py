"""Checks of a prompt's sampling parameters and messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_schemas import encode_schema
from rhapsody_mcp.model.specs import Role

__all__ = ["MAX_ANSWERS", "MAX_LOGPROBS", "SAMPLING", "check_integer", "check_message", "check_parameter"]

MAX_ANSWERS = 128
"""The limit of OpenAI's API."""
MAX_LOGPROBS = 20
"""The limit of OpenAI's API, and vLLM's default max_logprobs."""
_MAX_INTEGER = 2**31 - 1  # the limit of model servers
_MAX_SEED = 2**63 - 1
_MAX_STOP_SEQUENCES = 4


def check_parameter(field: str, value: Any) -> Any:
    """The value in the form for a model server; `json_schema` as JSON bytes. Raises InvalidTask."""
    return None if value is None else SAMPLING[field](field, value)


def check_integer(field: str, value: Any, least: int, most: int = _MAX_INTEGER) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidTask(f"{field} is {value!r}; valid is a whole number from {least} to {most}.", field=field)
    return value


def check_message(message: object) -> None:
    """Raise InvalidTask for an invalid chat message; its content is not checked."""
    if not isinstance(message, dict):
        raise InvalidTask(
            f"messages holds a {type(message).__name__}; valid is one such as {_MESSAGE}.", field="messages"
        )
    if message.get("role") not in get_args(Role):
        raise InvalidTask(
            f'the role of a message is {message.get("role")!r}; valid: "system", "user", "assistant".', field="messages"
        )
    if other := next((key for key in message if key not in ("role", "content")), None):
        raise InvalidTask(
            f"a message has {other!r}; it has role and content alone, as in {_MESSAGE}.", field="messages"
        )
    if "content" not in message:
        raise InvalidTask(f"a message has no content; valid is one such as {_MESSAGE}.", field="messages")


_MESSAGE = '{"role": "user", "content": "..."}'


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InvalidTask(f"{field} is {value!r}; valid is a number from {low} to {high}.", field=field)
        return float(value)

    return check


def _integer(least: int, most: int = _MAX_INTEGER) -> Callable[[str, Any], int]:
    return lambda field, value: check_integer(field, value, least, most)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidTask(f"{field} is {value!r}; valid is a text.", field=field)
    return value


def _top_k(field: str, value: Any) -> int:
    return -1 if value == -1 else check_integer(field, value, least=1)


def _texts(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text for text in value):
        raise InvalidTask(f"{field} is {value!r}; valid is a list of texts that are not empty.", field=field)
    if len(value) > _MAX_STOP_SEQUENCES:
        raise InvalidTask(f"it has {len(value)} {field}; a model server takes {_MAX_STOP_SEQUENCES} at most.")
    return tuple(value)


SAMPLING: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "temperature": _number(0.0, 2.0),
    "max_tokens": _integer(1),
    "top_p": _number(0.0, 1.0),
    "top_k": _top_k,
    "seed": _integer(0, _MAX_SEED),
    "n": _integer(1, MAX_ANSWERS),
    "logprobs": _integer(0, MAX_LOGPROBS),
    "stop_sequences": _texts,
    "json_schema": lambda _, value: encode_schema(value),
}
"""The check of each parameter, by field."""
