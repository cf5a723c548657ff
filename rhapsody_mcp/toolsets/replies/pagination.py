"""Pages of a JSON result, and of the part at a JSON Pointer, read no further than the page needs."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask
from rhapsody_mcp.model.json_pointer import describe_keys, split_pointer
from rhapsody_mcp.model.values import Value

__all__ = ["Page", "cut_page", "first_index", "page_of_items", "page_of_value"]

Data = bytes | mmap.mmap
"""A JSON text without white space between its tokens, as every encoder of this package writes JSON."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_SCALAR = re.compile(rb'%s|[^,"\[\]{}]++' % _STRING, re.DOTALL)
_TOKEN = re.compile(rb"%s|[\[\]{}]" % _STRING, re.DOTALL)
_LEVEL_1 = rb'[\[{](?:%s|[^"\[\]{}]++)*+[\]}]' % _STRING
_LEVEL_2 = rb'[\[{](?:%s|[^"\[\]{}]++|%s)*+[\]}]' % (_STRING, _LEVEL_1)
_RUN_LENGTH = 64
_RUN = re.compile(rb'(?:(?:%s|[^,"\[\]{}]++|%s)++,){%d}' % (_STRING, _LEVEL_2, _RUN_LENGTH), re.DOTALL)
"""_RUN_LENGTH items of a list, or entries of a dict, that are nested at most two levels deep."""
_CHARACTERS = re.compile(rb'(?:[^"\\]|\\u....|\\[^u])*+', re.DOTALL)
_TYPES = {b"[": "list", b"{": "dict", b"t": "bool", b"f": "bool", b"n": "NoneType"}


class Page(msgspec.Struct, frozen=True):
    """Items or characters of a result from `start` on, `total` of which there are; `size` is the size of the whole
    result, in bytes of JSON.

    `pieces` are items of a list, entries of a dict, or one single value, each as JSON; `text` is a part of a text. A
    piece that is too long for a page comes alone and without its end: `broken`. A page of a plain view of a Python
    object has the type of the object in `view_of`, and of an array or a table a description in `about`; the items of a
    table are the rows below `columns`.
    """

    type: str
    size: int
    total: int | None = None
    start: int = 0
    pieces: tuple[bytes, ...] = ()
    text: str | None = None
    broken: bool = False
    view_of: str = ""
    about: str = ""
    columns: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """As in `list of 1000 items, 52301 bytes`."""
        if self.about:
            return f"{self.about}, {self.size} bytes"
        length = "" if self.total is None else f" of {self.total} {self.unit}"
        return f"{self.view_of or self.type}{length}, {self.size} bytes"

    @property
    def unit(self) -> str:
        return "characters" if self.text is not None else "rows" if self.columns else "items"

    @property
    def end(self) -> int:
        """Where the next page starts."""
        return self.start + (len(self.pieces) - self.broken if self.text is None else len(self.text))

    @property
    def is_whole(self) -> bool:
        """Whether the page is all of the result."""
        return not self.broken and not self.start and (self.total is None or self.end >= self.total)

    @property
    def json(self) -> str:
        """The page as JSON; of a broken piece, the beginning."""
        if self.text is not None:
            return msgspec.json.encode(self.text).decode()
        text = b",".join(self.pieces).decode("utf-8", "ignore")
        brackets = {"list": "[]", "dict": "{}"}.get(self.type, "")
        return f"{brackets[0]}{text}{brackets[1]}" if brackets and not self.broken else text

    @property
    def data(self) -> Any:
        """The page as a Python value; a broken piece has none."""
        return msgspec.json.decode(self.json)


def page_of_value(value: Value, path: str, start: int | None, limit: int | None, max_bytes: int) -> Page:
    """A page of the part of a JSON value at a JSON Pointer: at most `limit` items or characters, and `max_bytes`. A
    negative `start` counts from the end.

    Raises InvalidTask where there is nothing at the path, InvalidRequest where there is nothing at the start, and
    ResultGone where the file is gone.
    """
    data = value.data if value.data is not None else _mapped(value)
    at = _find(data, path)
    size = _end(data, at) - at if path else value.size
    total = None if path else value.length
    kind = data[at : at + 1]
    if kind == b'"':
        return _page_of_text(data, at, size, total, start, limit, max_bytes)
    type = _TYPES.get(kind) or ("float" if re.search(rb"[.eE]", data[at : at + size]) else "int")
    if kind not in b"[{":
        if start is not None or limit is not None:
            raise InvalidRequest(f"this is one value of type {type}: leave start and limit out.")
        return Page(type, size, pieces=(data[at : at + size],))
    if total is None:
        total = _skip(data, at + 1, sys.maxsize)[1]
    first = first_index(start, total, "items")
    items = _items(data, _skip(data, at + 1, first)[0], max_bytes)
    return page_of_items(items, Page(type, size, total, first), limit, max_bytes)


def page_of_items(items: Iterable[bytes], page: Page, limit: int | None, max_bytes: int) -> Page:
    """The page with the items that fit; of the first item, at least the beginning."""
    pieces: list[bytes] = []
    left = max_bytes
    for item in items:
        left -= len(item) + 1
        if len(pieces) == limit or (pieces and left < 0):
            break
        if left < 0:
            return msgspec.structs.replace(page, pieces=(item[:max_bytes],), broken=True)
        pieces.append(item)
    return msgspec.structs.replace(page, pieces=tuple(pieces))


def cut_page(page: Page, max_bytes: int) -> Page:
    """The page with as many of its pieces or characters as fit."""
    if page.text is not None:
        return msgspec.structs.replace(page, text=_cut_text(page.text, max_bytes))
    if page.broken:
        return msgspec.structs.replace(page, pieces=(page.pieces[0][:max_bytes],))
    return page_of_items(page.pieces, page, None, max_bytes)


def first_index(start: int | None, total: int, unit: str) -> int:
    """The number of the first item or character. Raises InvalidRequest past the end."""
    first = max(0, (start or 0) + (total if start and start < 0 else 0))
    if first and first >= total:
        raise InvalidRequest(f"start {start} is past the end: there are {total} {unit}, counted from 0.")
    return first


# --- inside a JSON text


def _mapped(value: Value) -> mmap.mmap:
    """The file in memory, read as far as it is used. The garbage collector closes the map, as matches refer to it."""
    with value.open() as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _find(data: Data, path: str) -> int:
    """The position of the part at a JSON Pointer."""
    at = 0
    for step in split_pointer(path):
        part = _entry(data, at, step) if data[at : at + 1] == b"{" else _item(data, at, step)
        if part is None:
            raise InvalidTask(f"path {path!r} leads nowhere: at {step!r} there is {_describe(data, at, step)}.")
        at = part
    return at


def _item(data: Data, at: int, step: str) -> int | None:
    if data[at : at + 1] != b"[" or not re.fullmatch(r"-?[0-9]+", step):
        return None
    index = int(step)
    if index < 0:
        index += _skip(data, at + 1, sys.maxsize)[1]
    position, skipped = _skip(data, at + 1, max(index, 0))
    return position if index == skipped and data[position : position + 1] not in b"]," else None


def _entry(data: Data, at: int, step: str) -> int | None:
    key = msgspec.json.encode(step)
    return next((start + len(name) + 1 for start, name in _keys(data, at + 1) if name == key), None)


def _keys(data: Data, at: int) -> Iterator[tuple[int, bytes]]:
    while data[at : at + 1] not in b"}":
        key = _matched(_SCALAR, data, at)
        yield at, data[at:key]
        at = _end(data, key + 1)
        at += data[at : at + 1] == b","


def _items(data: Data, at: int, max_bytes: int) -> Iterator[bytes]:
    """The items from `at` on; of an item that is too long, the beginning."""
    while data[at : at + 1] not in b"]}":
        end = _end_of_item(data, at)
        yield data[at : min(end, at + max_bytes + 1)]
        at = end + (data[end : end + 1] == b",")


def _skip(data: Data, at: int, most: int) -> tuple[int, int]:
    """Skip at most `most` items: the position of the next item or the closing bracket, and how many were skipped."""
    skipped = 0
    while skipped < most and data[at : at + 1] not in b"]}":
        if most - skipped >= _RUN_LENGTH and (run := _RUN.match(data, at)):
            at, skipped = run.end(), skipped + _RUN_LENGTH
            continue
        for _ in range(min(_RUN_LENGTH, most - skipped)):
            at, skipped = _end_of_item(data, at), skipped + 1
            if data[at : at + 1] != b",":
                return at, skipped
            at += 1
    return at, skipped


def _end_of_item(data: Data, at: int) -> int:
    """The end of an item of a list, or of an entry of a dict."""
    end = _end(data, at)
    return _end(data, end + 1) if data[end : end + 1] == b":" else end


def _end(data: Data, at: int) -> int:
    """The end of the value that starts at `at`."""
    if data[at : at + 1] not in b"[{":
        return _matched(_SCALAR, data, at)
    depth = 0
    for token in _TOKEN.finditer(data, at):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0][:1], 0)
        if not depth:
            return token.end()
    raise _broken_text()


def _matched(pattern: re.Pattern[bytes], data: Data, at: int) -> int:
    if (match := pattern.match(data, at)) is None:
        raise _broken_text()
    return match.end()


def _broken_text() -> InvalidTask:
    return InvalidTask("this result is no whole JSON text: its file was changed. Run the task again.")


def _describe(data: Data, at: int, step: str) -> str:
    kind = data[at : at + 1]
    if kind == b"{":
        return describe_keys(step, (msgspec.json.decode(key) for _, key in _keys(data, at + 1)))
    if kind == b"[":
        return f"a list of length {_skip(data, at + 1, sys.maxsize)[1]}"
    return "a single value"


def _page_of_text(
    data: Data, at: int, size: int, total: int | None, start: int | None, limit: int | None, max_bytes: int
) -> Page:
    if start or total is None:
        text = msgspec.json.decode(data[at : _end(data, at)])
        total, first = len(text), first_index(start, len(text), "characters")
    else:
        end = _matched_head(data, at + 1, max_bytes)
        text, first = msgspec.json.decode(b'"%s"' % _whole_characters(data[at + 1 : end])), 0
    return Page("str", size, total, first, text=_cut_text(text[first:][:limit], max_bytes))


def _matched_head(data: Data, at: int, max_bytes: int) -> int:
    match = _CHARACTERS.match(data, at, at + 6 * max_bytes)
    return match.end() if match else at


def _whole_characters(data: bytes) -> bytes:
    return data.decode("utf-8", "ignore").encode()


def _cut_text(text: str, max_bytes: int) -> str:
    return text[:max_bytes].encode()[:max_bytes].decode("utf-8", "ignore")
