"""What stands for an item in a task that runs once for each: `{item}` in a text, `{"item": true}` as a value.

`{"item": true, "path": pointer}` and `{item/pointer}` are a part of the item, and `{{item}}` in a text is `{item}` as
it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.runtime.tasks import Part, Task, Text

__all__ = ["as_text", "holds_item", "with_item"]

_TOKEN = re.compile(r"\{\{item(?:/[^{}]*)?\}\}|\{item(/[^{}]*)?\}")
_MISTAKEN = re.compile(r"\{item[.\[][^{}]*\}")
_SHAPES = (frozenset({"item"}), frozenset({"item", "path"}))


def holds_item(value: Any) -> bool:
    """Whether something in it stands for the item."""
    return any(True for _ in _places(value))


def _places(value: Any) -> Iterator[Any]:
    if _is_item(value) or (isinstance(value, str) and any(not _is_escaped(found) for found in _TOKEN.finditer(value))):
        yield value
    elif isinstance(value, dict) and value.keys() != {"literal"}:
        for part in value.values():
            yield from _places(part)
    elif isinstance(value, Text):
        yield from _places(value.parts)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _places(part)


def with_item(value: Any, item: Any) -> Any:
    """The value with the item in its places; as a literal, so that nothing in the item is read as a reference.

    Raises InvalidTask for a path that leads nowhere in it, and where a text would need an item that only workers can
    read.
    """
    if _is_item(value):
        return {"literal": _part(item, value.get("path") or "")}
    if isinstance(value, str):
        if mistaken := _MISTAKEN.search(value):
            raise InvalidTask(
                f"{mistaken.group()} in a text names a part wrongly; write it as in {{item/name}} or {{item/0}}."
            )
        return _TOKEN.sub(lambda found: _text(found, item), value)
    if isinstance(value, Text):
        return Text(*(with_item(part, item) for part in value.parts))
    if isinstance(value, dict) and value.keys() != {"literal"}:
        return {key: with_item(part, item) for key, part in value.items()}
    return [with_item(part, item) for part in value] if isinstance(value, list | tuple) else value


def _is_escaped(found: re.Match[str]) -> bool:
    return found.group().startswith("{{")


def _text(found: re.Match[str], item: Any) -> str:
    return found.group()[1:-1] if _is_escaped(found) else as_text(_part(item, found.group(1) or ""))


def as_text(item: Any) -> str:
    """A text as it is, anything else as JSON."""
    if isinstance(item, str):
        return item
    try:
        return msgspec.json.encode(item).decode()
    except (TypeError, ValueError):
        raise InvalidTask(
            'the items are results that no text can hold; give the task {"item": true} in args or kwargs.'
        ) from None


def _is_item(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("item") is not True or value.keys() not in _SHAPES:
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
