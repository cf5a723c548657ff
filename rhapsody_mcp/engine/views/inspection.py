"""Converts a Python object to plain data of bounded size, for display. It runs in a process for user code."""

from __future__ import annotations

import binascii
import dataclasses
import itertools
import math
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.engine.isolation.sources import MODULE_PREFIX
from rhapsody_mcp.engine.task.error_text import Interrupted, bounded, sendable
from rhapsody_mcp.engine.views.pictures import Bounds, Drawn, about_picture, describe_file, draw
from rhapsody_mcp.engine.views.tables import about_array, about_table, as_table, shape_of
from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, ResultGone
from rhapsody_mcp.model.json_pointer import describe_keys, read_kept, split_pointer
from rhapsody_mcp.model.values import KeptFiles, Value, load

__all__ = ["PictureView", "View", "about", "as_list", "head_of_table", "plain_text", "type_name", "view"]

_DEPTH, _ITEMS, _ELEMENTS, _ROW, _CHARS = 8, 100, 1000, 20, 1000
"""Limits for nested values: levels, items of one container, elements of an array, and of a longer row, characters of a
text."""
_WITH_TEXT = frozenset({"datetime", "decimal", "fractions", "pathlib", "uuid"})
"""Modules whose types have a text that says what their repr says."""
_CONTAINERS: Any = Mapping | list | tuple | deque | set | frozenset
_TYPE_CHARS = 200
_BUILT_IN = frozenset({int, float, str, bool, bytes, type(None), list, dict, tuple})
_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = _REPR.maxlong = _CHARS


class View(msgspec.Struct, frozen=True):
    """Part of an object as plain data: from item or character `start`, of `total` items or characters. A single value
    has no `total`. The rows of a table are lists of cells, below `columns`."""

    type: str
    plain: Any
    total: int | None = None
    start: int = 0
    about: str = ""
    columns: list[str] = []


class PictureView(msgspec.Struct, frozen=True):
    """A picture as base64, empty where it cannot be shown, for the reason `why`; `size` are the bytes of the original.
    `about` describes the original, and `shown` what is shown in its place."""

    about: str
    mime_type: str
    base64: str
    size: int
    shown: str = ""
    why: str = ""


def view(
    value: Value,
    path: str,
    start: int | None,
    limit: int | None,
    max_bytes: int,
    picture_bounds: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Return {"view": a View as a dict} of the value at the JSON Pointer `path`: at most `limit` items or characters,
    and at most about `max_bytes` of them. Of a picture, return {"picture": a PictureView as a dict}, within the bytes
    and the pixels of `picture_bounds`.

    Return {"refusal": {"code": ..., "message": ...}} for an InvalidTask (the path does not exist), an
    InvalidRequest (`start` is past the end), or a ResultGone (the value's file is gone).
    """
    try:
        part = _follow(load(value), path)
        drawn = draw(part, Bounds(*picture_bounds))
        if drawn is None:
            return {"view": msgspec.structs.asdict(_view(part, start, limit, max_bytes))}
        if drawn.facts.kind != "SVG":
            return {"picture": msgspec.structs.asdict(_picture_view(drawn))}
        text = _view(drawn.data.decode("utf-8", "replace"), start, limit, max_bytes)
        facts = {"type": drawn.facts.mime_type, "about": drawn.facts.text(drawn.size)}
        return {"view": msgspec.structs.asdict(text) | facts}
    except InvalidRequest as error:
        return {"refusal": {"code": error.code, "message": str(error)}}


def _picture_view(drawn: Drawn) -> PictureView:
    described = (drawn.original or drawn.facts).text(drawn.size)
    shown = drawn.facts.text(len(drawn.data)) if drawn.original else ""
    encoded = binascii.b2a_base64(drawn.data, newline=False).decode()
    return PictureView(described, drawn.facts.mime_type, encoded, drawn.size, shown, drawn.why)


def about(value: Any) -> str:
    """Describe a picture, a table or an array in a few words; empty for another value."""
    if type(value) in _BUILT_IN - {bytes}:
        return ""
    try:
        return bounded(about_picture(value) or about_table(value) or about_array(value), _TYPE_CHARS)
    except Interrupted:
        raise
    except BaseException:  # an attribute of a user's object may raise anything
        return ""


def plain_text(value: Any, max_bytes: int) -> str:
    """Return the whole value as JSON, in which pictures, tables and long arrays are described; empty if the JSON is
    longer than `max_bytes`, or if the value itself is only described."""
    converter = _PlainConverter(max_bytes)
    plain_value = converter.convert(value)
    return (
        ""
        if converter.is_cut or (isinstance(plain_value, str) and not _is_scalar(value))
        else msgspec.json.encode(plain_value).decode()
    )


def head_of_table(value: Any, max_bytes: int) -> str:
    """Return the columns and the first rows of a table as text; empty for another value."""
    if as_table(value) is None:
        return ""
    seen = _view(value, None, _HEAD_ROWS, max_bytes)
    return f"{', '.join(seen.columns)}: {msgspec.json.encode(seen.plain).decode()}"


_HEAD_ROWS = 20


# --- a part of it


def _follow(value: Any, path: str) -> Any:
    """Return the part at the path; of a kept file, the content."""
    before: Any = None
    for step in split_pointer(path):
        before, value = value, read_kept(value, before)
        parts = _parts(value)
        try:
            if isinstance(parts, Mapping):
                value = parts[step] if step in parts else {_key(key): part for key, part in parts.items()}[step]
            else:
                value = parts[int(step)]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise InvalidTask(
                f"path {path!r} leads nowhere: at {step!r} there is {_describe_position(parts, step)}."
            ) from error
    return _content(value) if isinstance(value, str) and isinstance(before, KeptFiles) else value


def _content(path: str) -> str | bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ResultGone(f"the kept file {path} is gone; submit its task again.") from error
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _described(value: Any) -> Any:
    """Return kept files as what each is, with its path; any other value unchanged."""
    if not isinstance(value, KeptFiles):
        return value
    return {name: f"{describe_file(part)}, {part}" if isinstance(part, str) else part for name, part in value.items()}


def _describe_position(parts: Any, step: str) -> str:
    if isinstance(parts, Mapping):
        return describe_keys(step, parts)
    return f"a list of length {_length(parts)}" if _length(parts) is not None else f"a {type(parts).__name__}"


def _view(value: Any, start: int | None, limit: int | None, max_bytes: int) -> View:
    parts = _parts(_described(value))
    table = as_table(value)
    total = _length(parts) if table is None else table.row_count
    if total is None:
        if start is not None or limit is not None:
            raise InvalidRequest(f"this is one value of type {type_name(value)}: leave start and limit out.")
        return View(type_name(value), _PlainConverter(max_bytes, max_text_chars=max_bytes // 2).convert(value))
    first = max(0, (start or 0) + (total if start and start < 0 else 0))
    if first and first >= total:
        raise InvalidRequest(f"start {start} is past the end: there are {total}, counted from 0.")
    last = total if limit is None else min(total, first + limit)
    if isinstance(parts, str):
        return View(type_name(value), _text(parts[first:last], max_bytes // 4), total, first)
    plain = _PlainConverter(max_bytes)
    if table is not None:
        numbered_rows = enumerate(table.rows(first, min(last, first + max_bytes // 2)))
        rows = [row for _, row in plain.convert_entries(numbered_rows)]
        return View(type_name(value), rows, total, first, about(value), table.columns)
    if isinstance(parts, Mapping):
        entries = itertools.islice(parts.items(), first, last)
        return View(type_name(value), {_key(key): part for key, part in plain.convert_entries(entries)}, total, first)
    numbered = ((number, parts[number]) for number in range(first, last))
    items = [part for _, part in plain.convert_entries(numbered)]
    return View(type_name(value), items, total, first, about(value))


def _parts(value: Any) -> Any:
    """Return the parts of a value: a Mapping, or a sequence. A single value is returned unchanged."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=False))
    return as_list(value) if isinstance(value, set | frozenset) else value


def _length(parts: Any) -> int | None:
    """Return the number of parts; None for a single value."""
    shape = shape_of(parts)
    if shape is not None:
        return shape[0] if shape else None
    is_many = isinstance(parts, str | _CONTAINERS) and not isinstance(parts, Enum)
    return len(parts) if is_many else None


# --- as plain data


class _PlainConverter:
    """Converts values to plain data of about `max_bytes` in total; `is_cut` is True once something was left out."""

    def __init__(self, max_bytes: int, max_text_chars: int = _CHARS) -> None:
        self.bytes_left, self._max_text_chars, self.is_cut = max_bytes, max_text_chars, False

    def convert_entries(self, parts: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield the first entries, converted, as long as bytes are left; at least one."""
        for number, (key, part) in enumerate(parts):
            plain_value = self.convert(part, 1)
            self.bytes_left -= len(_key(key)) + 4
            if number and self.bytes_left < 0:
                return
            yield key, plain_value

    def convert(self, value: Any, depth: int = 0) -> Any:
        plain_value = self._convert_value(value, depth)
        if not isinstance(plain_value, list | dict):
            self.bytes_left -= 5 if plain_value is None or isinstance(plain_value, bool) else len(str(plain_value)) + 2
        return plain_value

    def _convert_value(self, value: Any, depth: int) -> Any:
        if _is_scalar(value):
            return self._scalar(value)
        if (shape := shape_of(value)) is not None:
            return self._array(value, shape, depth)
        if type(value) not in _BUILT_IN and (description := about(value)):
            return description
        parts = _parts(_described(value))
        if not isinstance(parts, _CONTAINERS):
            return self._repr(value)
        if depth >= _DEPTH or self.bytes_left < 0:
            return self._shortened(f"{type_name(value)} of {len(parts)} items")
        if isinstance(parts, Mapping):
            entries = {
                _key(key): self.convert(part, depth + 1) for key, part in self._affordable_items(parts.items(), depth)
            }
            more = len(parts) - len(entries)
            return {**entries, "...": self._shortened(f"and {more} more")} if more > 0 else entries
        items = [self.convert(part, depth + 1) for part in self._affordable_items(parts, depth)]
        more = len(parts) - len(items)
        return [*items, self._shortened(f"... and {more} more")] if more > 0 else items

    def _array(self, value: Any, shape: tuple[int, ...], depth: int) -> Any:
        if shape == () or math.prod(shape) <= _ELEMENTS:
            return self.convert(value.tolist(), depth)
        if len(shape) == 1 and depth == 1:  # a row
            return [*self.convert(value[:_ROW].tolist(), depth), self._shortened(f"... and {shape[0] - _ROW} more")]
        return about_array(value) or type_name(value)

    def _affordable_items(self, parts: Any, depth: int) -> Iterator[Any]:
        """Yield items as long as bytes are left; of a nested container, at most _ITEMS."""
        for number, part in enumerate(parts):
            if self.bytes_left < 0 or (depth and number >= _ITEMS):
                return
            self.bytes_left -= 2
            yield part

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, float):
            return _number(float(value))
        if isinstance(value, str):
            text = _text(str(value), self._max_text_chars)
            return text if len(text) == len(value) else self._shortened(f"{text} ... ({len(value)} characters)")
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value) if -(2**63) <= value < 2**64 else self._repr(value)
        return value

    def _repr(self, value: Any) -> str:
        if isinstance(value, bytes | bytearray | memoryview):
            return about_picture(value) or f"binary, {len(value)} bytes"
        try:
            if not _WITH_TEXT.isdisjoint(kind.__module__ for kind in type(value).__mro__):
                return _text(str(value), _CHARS)
            return _text(_REPR.repr(value), _CHARS)
        except Interrupted:
            raise
        except BaseException:  # a __repr__ may raise anything
            return type_name(value)

    def _shortened(self, summary: str) -> str:
        self.is_cut = True
        return summary


def _is_scalar(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum))


def _number(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _key(key: Any) -> str:
    return _text(key, _CHARS) if isinstance(key, str) else _text(_REPR.repr(key), _CHARS)


def _text(text: str, max_chars: int) -> str:
    return sendable(text[:max_chars])


def type_name(value: Any) -> str:
    """Return the name of the type, with its module unless the type is built in or defined by the task's own source."""
    kind = type(value)
    if kind in _BUILT_IN:
        return kind.__name__
    module = str(kind.__module__)
    is_users = module in ("builtins", "__main__") or module.startswith(MODULE_PREFIX)
    return bounded(kind.__name__ if is_users else f"{module}.{kind.__name__}", _TYPE_CHARS)


def as_list(value: Any) -> list[Any]:
    """Return the items as a list: of an array as plain numbers, of a set sorted if its items can be compared.

    Raises TypeError if the value is text, bytes, a mapping or not iterable.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"the result is of type {type(value).__name__}")
    if hasattr(value, "tolist"):
        listed = value.tolist()
        return listed if isinstance(listed, list) else [listed]
    if not isinstance(value, set | frozenset):
        return list(value)
    try:
        return sorted(value)
    except TypeError:
        return list(value)
