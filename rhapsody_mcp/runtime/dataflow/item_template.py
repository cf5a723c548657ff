"""Placeholders for the item of a for_each: `{item}` in a text, `{"item": true}` as a value.

`{"item": true, "path": pointer}` and `{item/pointer}` stand for a part of the item. `{{item}}` in a text is the literal
`{item}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.runtime.dataflow.references import is_escaped, is_literal
from rhapsody_mcp.runtime.tasks import Part, Task, Text

__all__ = ["as_text", "has_placeholder", "with_item"]

_TEXT_PLACEHOLDER = re.compile(r"\{\{item(?:/[^{}]*)?\}\}|\{item(/[^{}]*)?\}")
_MISTAKEN = re.compile(r"\{item[.\[][^{}]*\}")
_PLACEHOLDER_KEYS = (frozenset({"item"}), frozenset({"item", "path"}))


def has_placeholder(value: Any) -> bool:
    """Whether the value holds a placeholder, at any depth."""
    return any(True for _ in _placeholders(value))


def _placeholders(value: Any) -> Iterator[Any]:
    if _is_item(value) or (
        isinstance(value, str) and any(not is_escaped(match) for match in _TEXT_PLACEHOLDER.finditer(value))
    ):
        yield value
    elif isinstance(value, dict) and not is_literal(value):
        for part in value.values():
            yield from _placeholders(part)
    elif isinstance(value, Text):
        yield from _placeholders(value.parts)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _placeholders(part)


def with_item(value: Any, item: Any) -> Any:
    """The value with the item in the place of each placeholder.

    The item becomes a literal, so that nothing in the item is read as a reference. Raises InvalidTask for a path that
    the item does not have, and for a text whose item only workers can read.
    """
    if _is_item(value):
        return {"literal": _part(item, value.get("path") or "")}
    if isinstance(value, str):
        if mistaken := _MISTAKEN.search(value):
            raise InvalidTask(
                f"{mistaken.group()} in a text names a part wrongly; write it as in {{item/name}} or {{item/0}}."
            )
        return _TEXT_PLACEHOLDER.sub(lambda match: _replacement(match, item), value)
    if isinstance(value, Text):
        return Text(*(with_item(part, item) for part in value.parts))
    if isinstance(value, dict) and not is_literal(value):
        return {key: with_item(part, item) for key, part in value.items()}
    return [with_item(part, item) for part in value] if isinstance(value, list | tuple) else value


def _replacement(match: re.Match[str], item: Any) -> str:
    return match.group()[1:-1] if is_escaped(match) else as_text(_part(item, match.group(1) or ""))


def as_text(item: Any) -> str:
    """A text unchanged, another value as JSON. Raises InvalidTask for a value that JSON cannot hold."""
    if isinstance(item, str):
        return item
    try:
        return msgspec.json.encode(item).decode()
    except (TypeError, ValueError):
        raise InvalidTask(
            'the items are results that no text can hold; give the task {"item": true} in args or kwargs.'
        ) from None


def _is_item(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("item") is not True or value.keys() not in _PLACEHOLDER_KEYS:
        return False
    if not isinstance(value.get("path"), str | None):
        raise InvalidTask(f"path is {value['path']!r}; valid is a JSON Pointer, as in '/0/label'.", field="path")
    return True


def _part(item: Any, path: str) -> Any:
    if not path:
        return item
    if isinstance(item, Task):
        return Part(item, path)
    return Part(item.task, item.path + path) if isinstance(item, Part) else resolve_pointer(item, path)
