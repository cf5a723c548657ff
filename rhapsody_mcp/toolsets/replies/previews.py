"""Short previews of results, for replies with many rows; no file is read for a preview."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from rhapsody_mcp.model.values import Stream, Value
from rhapsody_mcp.runtime.tasks import ForEach, Task
from rhapsody_mcp.toolsets.replies.formatting import one_line

__all__ = [
    "Preview",
    "described",
    "json_item",
    "plain_value_advice",
    "preview_task",
    "preview_value",
    "printed_only_text",
]

_PLAIN = "numbers, texts, lists and dicts with texts as keys"


class Preview(msgspec.Struct, frozen=True):
    """The text of a result: where it is `complete`, the whole as JSON, and `value` is the result itself; else the
    beginning and a description of the whole."""

    text: str
    complete: bool = False
    value: Any = None


def preview_task(task: Task, max_chars: int, shows: Callable[[Task], bool]) -> Preview | None:
    """The preview of a task's result. A for_each that has ended has a list of results; before, a dict by number of the
    results of the children that `shows` is true of."""
    if isinstance(task, ForEach) and task.children:
        return _preview_children(task, max_chars, shows)
    value = task.outcome.value if task.outcome else None
    return None if value is None else preview_value(value, max_chars)


def preview_value(value: Value, max_chars: int) -> Preview:
    if value.is_picture:
        return Preview(f"{one_line(value.about)}; get_result shows it")
    if value.format != "json":
        return Preview(_with_end(one_line(value.preview), max_chars, described(value)))
    if value.data is not None and len(text := value.data.decode()) <= max_chars:
        return Preview(text, True, msgspec.json.decode(value.data))
    beginning = value.preview if value.data is None else text
    if value.type == "str" and not beginning.startswith('"'):  # the output of a program is no JSON
        beginning = msgspec.json.encode(beginning).decode()[:-1]
    return Preview(f"{beginning[:max_chars]} ... ({described(value)})")


def _preview_children(task: ForEach, max_chars: int, shows: Callable[[Task], bool]) -> Preview:
    numbered = list(enumerate(task.children))
    if task.state.final:
        items, brackets = (json_item(child) for _, child in numbered), "[]"
    else:
        items = (b'"%d":%s' % (number, json_item(child)) for number, child in numbered if shows(child))
        brackets = "{}"
    text, complete = _joined(items, max_chars)
    if complete:
        whole = f"{brackets[0]}{text}{brackets[1]}"
        return Preview(whole, True, msgspec.json.decode(whole))
    return Preview(f"{brackets[0]}{text} ... (of {len(numbered)} results)")


def _joined(items: Iterable[bytes], max_chars: int) -> tuple[str, bool]:
    """The whole items that fit, and whether these are all items."""
    shown: list[str] = []
    left = max_chars
    for item in items:
        text = item.decode()
        left -= len(text) + 1
        if left < 0:
            return ",".join(shown), False
        shown.append(text)
    return ",".join(shown), True


def json_item(task: Task) -> bytes:
    """A task's result in a list of results, as JSON: null where there is none, a description where the result is long
    or no JSON."""
    value = task.outcome.value if task.outcome else None
    if value is None:
        return b"null"
    if value.format == "json" and value.data is not None:
        return value.data
    if value.format != "json" and (plain := _plain(value.preview)):
        return plain
    return msgspec.json.encode(f"({described(value)})")


def _plain(preview: str) -> bytes:
    """The preview where it is JSON of the whole object; empty where it only describes the object."""
    try:
        return msgspec.json.encode(msgspec.json.decode(preview))
    except (msgspec.MsgspecError, UnicodeError):
        return b""


def printed_only_text(value: Value | None, stdout: Stream) -> str:
    """As in `null; it printed 3 bytes, and returned nothing`; empty for any other result."""
    if value is None or value.data != b"null" or not stdout.text:
        return ""
    return f"null; it printed {stdout.size or len(stdout.text.encode())} bytes, and returned nothing"


def described(value: Value) -> str:
    """As in `list of 1000 items, 52301 bytes`."""
    if value.about:
        return one_line(value.about if value.is_picture else f"{value.about}, {value.size} bytes")
    if value.type == "bytes":
        return f"binary, {value.size if value.length is None else value.length} bytes"
    items = "" if value.length is None or value.type == "str" else f" of {value.length} items"
    return f"{value.type}{items}, {value.size} bytes"


def plain_value_advice(value: Value) -> str:
    """What a function should return so that `get_result` can show the value."""
    kind = value.type.partition(".")[0]
    if kind in ("numpy", "torch"):
        plain = "return value.tolist(), or numbers that sum it up"
    elif kind == "pandas":
        plain = 'return value.to_dict("records"), or numbers that sum it up'
    elif value.type in ("tuple", "set", "frozenset"):
        plain = "return a list"
    elif value.type == "float":
        plain = "return None in place of NaN and infinity"
    elif value.type == "bytes":
        plain = "write it to a file and return its path"
    elif value.type in ("list", "dict"):
        plain = f"return one that holds {_PLAIN} alone: no tuples, sets, NaN or other objects"
    else:
        plain = f"return {_PLAIN}"
    return f"To read it here, {plain}."


def _with_end(text: str, max_chars: int, what: str) -> str:
    shown = text[:max_chars] + (" ..." if len(text) > max_chars else "")
    return f"{shown} ({what})" if shown and shown != what else f"({what})"
