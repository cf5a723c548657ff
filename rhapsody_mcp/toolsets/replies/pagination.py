"""Parts and pages of a result that is JSON, found without reading more of it than they need."""

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

__all__ = ["Page", "cut", "first_of", "page_of_items", "page_of_value"]

Data = bytes | mmap.mmap
"""A JSON text without white space between its parts, as every encoder of this package writes it."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_SCALAR = re.compile(rb'%s|[^,"\[\]{}]++' % _STRING, re.DOTALL)
_TOKEN = re.compile(rb"%s|[\[\]{}]" % _STRING, re.DOTALL)
_LEVEL_1 = rb'[\[{](?:%s|[^"\[\]{}]++)*+[\]}]' % _STRING
_LEVEL_2 = rb'[\[{](?:%s|[^"\[\]{}]++|%s)*+[\]}]' % (_STRING, _LEVEL_1)
_RUN_LENGTH = 64
_RUN = re.compile(rb'(?:(?:%s|[^,"\[\]{}]++|%s)++,){%d}' % (_STRING, _LEVEL_2, _RUN_LENGTH), re.DOTALL)
"""So many items of a list, or entries of a dict, that are not nested deeply: found in one go."""
_CHARACTERS = re.compile(rb'(?:[^"\\]|\\u....|\\[^u])*+', re.DOTALL)
_TYPES = {b"[": "list", b"{": "dict", b"t": "bool", b"f": "bool", b"n": "NoneType"}


class Page(msgspec.Struct, frozen=True):
    """A run of what a result consists of, from `start` on, of `total` items or characters; `size` is the whole, in
    bytes of JSON.

    `pieces` are items of a list, entries of a dict, or one single value, each as JSON; `text` is of a text. A piece
    that is too long for a page comes alone, and is cut off: `broken`. `view_of` is the type of an object that is no
    JSON, of which this is a plain view.
    """

    type: str
    size: int
    total: int | None = None
    start: int = 0
    pieces: tuple[bytes, ...] = ()
    text: str | None = None
    broken: bool = False
    view_of: str = ""

    @property
    def described(self) -> str:
        """As in `list of 1000 items, 52301 bytes`."""
        of = "" if self.total is None else f" of {self.total} {self.unit}"
        return f"{self.view_of or self.type}{of}, {self.size} bytes"

    @property
    def unit(self) -> str:
        return "characters" if self.text is not None else "items"

    @property
    def end(self) -> int:
        """Where the next page starts."""
        return self.start + (len(self.pieces) - self.broken if self.text is None else len(self.text))

    @property
    def json(self) -> str:
        """As JSON; of a broken piece, its beginning."""
        if self.text is not None:
            return msgspec.json.encode(self.text).decode()
        text = b",".join(self.pieces).decode("utf-8", "ignore")
        brackets = {"list": "[]", "dict": "{}"}.get(self.type, "")
        return f"{brackets[0]}{text}{brackets[1]}" if brackets and not self.broken else text

    @property
    def data(self) -> Any:
        """The same as a value; not of a broken piece."""
        return msgspec.json.decode(self.json)


def page_of_value(value: Value, path: str, start: int | None, limit: int | None, max_bytes: int) -> Page:
    """Of the part that a JSON Pointer names, of a value that is JSON: at most `limit` items or characters, and what
    fits. A negative `start` counts from the end.

    Raises InvalidTask for a path and InvalidRequest for a start that leads nowhere; ResultGone where the file is gone.
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
    first = first_of(start, total, "items")
    items = _items(data, _skip(data, at + 1, first)[0], max_bytes)
    return page_of_items(items, Page(type, size, total, first), limit, max_bytes)


def page_of_items(items: Iterable[bytes], page: Page, limit: int | None, max_bytes: int) -> Page:
    """That page with those of the items that fit; of the first, at least its beginning."""
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


def cut(page: Page, max_bytes: int) -> Page:
    """As much of a page as fits."""
    if page.text is not None:
        return msgspec.structs.replace(page, text=_cut_text(page.text, max_bytes))
    if page.broken:
        return msgspec.structs.replace(page, pieces=(page.pieces[0][:max_bytes],))
    return page_of_items(page.pieces, page, None, max_bytes)


def first_of(start: int | None, total: int, unit: str) -> int:
    """Where a page starts. Raises InvalidRequest past the end."""
    first = max(0, (start or 0) + (total if start and start < 0 else 0))
    if first and first >= total:
        raise InvalidRequest(f"start {start} is past the end: there are {total} {unit}, counted from 0.")
    return first


# --- inside a JSON text


def _mapped(value: Value) -> mmap.mmap:
    """Its pages are read as they are looked at. It is closed by the garbage collector: matches hold on to it."""
    with value.open() as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _find(data: Data, path: str) -> int:
    """Where the part starts that a JSON Pointer names."""
    at = 0
    for step in split_pointer(path):
        found = _entry(data, at, step) if data[at : at + 1] == b"{" else _item(data, at, step)
        if found is None:
            raise InvalidTask(f"path {path!r} leads nowhere: at {step!r} there is {_there(data, at, step)}.")
        at = found
    return at


def _item(data: Data, at: int, step: str) -> int | None:
    if data[at : at + 1] != b"[" or not re.fullmatch(r"-?[0-9]+", step):
        return None
    index = int(step)
    if index < 0:
        index += _skip(data, at + 1, sys.maxsize)[1]
    found, skipped = _skip(data, at + 1, max(index, 0))
    return found if index == skipped and data[found : found + 1] not in b"]," else None


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
    """Those from `at` on; of one that is too long, its beginning."""
    while data[at : at + 1] not in b"]}":
        end = _end_of_item(data, at)
        yield data[at : min(end, at + max_bytes + 1)]
        at = end + (data[end : end + 1] == b",")


def _skip(data: Data, at: int, most: int) -> tuple[int, int]:
    """Where the item after at most so many starts, or the closing bracket is; and how many these were."""
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
    """Of an item of a list, or an entry of a dict."""
    end = _end(data, at)
    return _end(data, end + 1) if data[end : end + 1] == b":" else end


def _end(data: Data, at: int) -> int:
    """Of the value that starts here."""
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


def _there(data: Data, at: int, step: str) -> str:
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
        total, first = len(text), first_of(start, len(text), "characters")
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
