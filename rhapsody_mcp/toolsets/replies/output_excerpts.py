"""What tasks printed: its end, its beginning, or the lines with a text in them; bounded, whatever its size."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import anyio.to_thread
import msgspec

from rhapsody_mcp.model.values import Stream, Value, load_json
from rhapsody_mcp.runtime.tasks import ForEach

__all__ = ["Excerpt", "How", "look", "search_in_children", "search_in_value", "tail"]

How = Literal["tail", "head"]
_LINE_BYTES, _PIECE_BYTES = 300, 64 * 1024
_SEARCHED_BYTES = 64 * 1024 * 1024


class Excerpt(msgspec.Struct, frozen=True):
    """A part of what was printed, which are `size` bytes; `found` counts the lines that a search found."""

    how: How
    text: str
    size: int
    found: int | None = None

    @property
    def said(self) -> str:
        """As in `last 2048 of 52301 bytes`."""
        if self.found is not None:
            return f"{len(self.text.splitlines())} of {self.found} lines that were found in {self.size} bytes"
        shown = len(self.text.encode())
        if shown >= self.size:
            return f"{self.size} bytes"
        return f"{'last' if self.how == 'tail' else 'first'} {shown} of {self.size} bytes"

    def cut(self, max_bytes: int) -> Excerpt:
        data = self.text.encode()
        kept = data[max(0, len(data) - max_bytes) :] if self.how == "tail" else data[:max_bytes]
        return msgspec.structs.replace(self, text=kept.decode("utf-8", "ignore"))


async def look(stream: Stream, how: How, search: str | None, max_bytes: int) -> Excerpt:
    """With a `search`, the lines with one of its texts, which stand between "|", numbered; case is ignored."""
    if stream.file is None:
        return _look(stream, how, search, max_bytes)
    return await anyio.to_thread.run_sync(_look, stream, how, search, max_bytes)


async def search_in_children(task: ForEach, search: str, max_bytes: int) -> dict[str, Excerpt]:
    """What its tasks printed, by stream: the lines with one of the texts, each after the name of its task."""
    found: dict[str, Excerpt] = {}
    for name in ("stdout", "stderr"):
        lines: list[str] = []
        size, count, left = 0, 0, max_bytes
        for child in task.children:
            if child.outcome is None or size > _SEARCHED_BYTES:
                continue
            excerpt = await look(getattr(child.outcome, name), "head", search, max(left, 0))
            size, count = size + excerpt.size, count + (excerpt.found or 0)
            shown = [f"{child.name} {line}" for line in excerpt.text.splitlines()]
            left -= sum(len(line.encode()) + 1 for line in shown)
            lines += shown
        found[name] = Excerpt("head", "\n".join(lines), size, count)
    return found


async def search_in_value(value: Value, search: str, max_bytes: int) -> Excerpt | None:
    """The lines of a result with one of the texts, each after its place; None where it cannot be looked into."""
    if value.format != "json" or value.size > _SEARCHED_BYTES:
        return None
    return await anyio.to_thread.run_sync(_search_in_value, value, _wanted(search), max_bytes)


def _search_in_value(value: Value, wanted: list[str], max_bytes: int) -> Excerpt:
    lines, length, found = [], 0, 0
    for path, text in _texts_in(load_json(value)):
        for line in text.splitlines():
            if any(one in f"{path} {line}".casefold() for one in wanted):
                found += 1
                shown = f"{path or '/'} {line.encode()[:_LINE_BYTES].decode('utf-8', 'ignore')}"
                length += len(shown.encode()) + 1
                lines += [shown] if length <= max_bytes else []
    return Excerpt("head", "\n".join(lines), value.size, found)


def _texts_in(value: Any) -> Iterator[tuple[str, str]]:
    """Each single value as text, after the JSON Pointer to it."""
    pending = [("", value)]
    while pending:
        path, part = pending.pop()
        if isinstance(part, dict | list):
            inside = part.items() if isinstance(part, dict) else enumerate(part)
            pending += reversed([(f"{path}/{_escaped(str(key))}", one) for key, one in inside])
        else:
            yield path, part if isinstance(part, str) else msgspec.json.encode(part).decode()


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _wanted(search: str) -> list[str]:
    return [text.strip() for text in search.casefold().split("|") if text.strip()]


async def tail(stream: Stream, max_bytes: int) -> str:
    """The end of what was printed."""
    return (await look(stream, "tail", None, max_bytes)).text


def _look(stream: Stream, how: How, search: str | None, max_bytes: int) -> Excerpt:
    try:
        opened = _opened(stream)
    except (FileNotFoundError, NotADirectoryError):
        told = f"(its file, {stream.file}, is gone; this was its end)\n"
        return Excerpt("head", told + stream.text[-max(0, max_bytes - len(told)) :], stream.size)
    with opened as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - max_bytes) if how == "tail" and search is None else 0)
        if search is not None:
            return _found(file, search, max_bytes, size)
        return Excerpt(how, file.read(max_bytes).decode("utf-8", "replace"), size)


def _opened(stream: Stream) -> BinaryIO:
    return io.BytesIO(stream.text.encode()) if stream.file is None else Path(stream.file).open("rb")


def _found(file: BinaryIO, search: str, max_bytes: int, size: int) -> Excerpt:
    wanted = _wanted(search)
    lines, length, found = [], 0, 0
    for number, line in _numbered(file):
        if any(text in line.casefold() for text in wanted):
            found += 1
            shown = f"{number}: {line.encode()[:_LINE_BYTES].decode('utf-8', 'ignore').rstrip()}"
            length += len(shown.encode()) + 1
            lines += [shown] if length <= max_bytes else []
    return Excerpt("head", "\n".join(lines), size, found)


def _numbered(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Lines from 1; of one that is very long, its pieces."""
    number = 1
    while line := file.readline(_PIECE_BYTES):
        yield number, line.decode("utf-8", "replace")
        number += line.endswith(b"\n")
