"""Bounded excerpts of output and results: the end, the beginning, or the lines that contain a text."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import anyio.to_thread
import msgspec

from rhapsody_mcp.model.values import Stream, Value, load_json
from rhapsody_mcp.runtime.tasks import ForEach

__all__ = ["SEARCHED_BYTES", "Excerpt", "OutputEnd", "read_excerpt", "search_in_children", "search_in_value"]

OutputEnd = Literal["tail", "head"]
_LINE_BYTES, _PIECE_BYTES = 300, 64 * 1024
SEARCHED_BYTES = 64 * 1024 * 1024


class Excerpt(msgspec.Struct, frozen=True):
    """A part of an output of `size` bytes, without `left_out` of them; `found` is the number of lines that a search
    found."""

    end: OutputEnd
    text: str
    size: int
    found: int | None = None
    left_out: int = 0

    @property
    def extent(self) -> str:
        """As in `last 2048 of 52301 bytes`."""
        if self.found is not None:
            return f"{len(self.text.splitlines())} of {self.found} lines that were found in {self.size} bytes"
        if not self.left_out:
            return f"{self.size} bytes"
        return f"{'last' if self.end == 'tail' else 'first'} {self.size - self.left_out} of {self.size} bytes"

    def cut(self, max_bytes: int) -> Excerpt:
        data = self.text.encode()
        if len(data) <= max_bytes:
            return self
        kept = data[len(data) - max_bytes :] if self.end == "tail" else data[:max_bytes]
        shown = (self.size - self.left_out) * max_bytes // len(data)  # the text may have labels besides
        return msgspec.structs.replace(self, text=kept.decode("utf-8", "ignore"), left_out=self.size - shown)


async def read_excerpt(stream: Stream, end: OutputEnd, search: str | None, max_bytes: int) -> Excerpt:
    """One end of the output or, with a `search`, the lines that contain one of its texts, with line numbers. "|"
    separates the texts of a search; case is ignored."""
    if stream.file is None:
        return _read_excerpt(stream, end, search, max_bytes)
    return await anyio.to_thread.run_sync(_read_excerpt, stream, end, search, max_bytes)


async def search_in_children(task: ForEach, search: str, max_bytes: int) -> dict[str, Excerpt]:
    """The lines that a search finds in the outputs of the children, by stream, each after the name of its task."""
    excerpts: dict[str, Excerpt] = {}
    for name in ("stdout", "stderr"):
        lines: list[str] = []
        size, count, left = 0, 0, max_bytes
        for child in task.children:
            if child.outcome is None or size > SEARCHED_BYTES:
                continue
            excerpt = await read_excerpt(getattr(child.outcome, name), "head", search, max(left, 0))
            size, count = size + excerpt.size, count + (excerpt.found or 0)
            shown = [f"{child.name} {line}" for line in excerpt.text.splitlines()]
            left -= sum(len(line.encode()) + 1 for line in shown)
            lines += shown
        excerpts[name] = Excerpt("head", "\n".join(lines), size, count)
    return excerpts


async def search_in_value(value: Value, search: str, max_bytes: int) -> Excerpt | None:
    """The lines that a search finds in a result, each after the JSON Pointer to its text; None where the result is no
    JSON, or too large."""
    if value.format != "json" or value.size > SEARCHED_BYTES:
        return None
    return await anyio.to_thread.run_sync(_search_in_value, value, search, max_bytes)


def _search_in_value(value: Value, search: str, max_bytes: int) -> Excerpt:
    lines = ((path, line) for path, text in _texts_in(load_json(value)) for line in text.splitlines())
    searched = ((f"{path} {line}", f"{path or '/'} ", line) for path, line in lines)
    return _search(searched, search, max_bytes, value.size)


def _texts_in(value: Any) -> Iterator[tuple[str, str]]:
    """The JSON Pointer to each single value, and the value as text."""
    pending = [("", value)]
    while pending:
        path, part = pending.pop()
        if isinstance(part, dict | list):
            inside = part.items() if isinstance(part, dict) else enumerate(part)
            pending += reversed([(f"{path}/{_escaped(str(key))}", inner) for key, inner in inside])
        else:
            yield path, part if isinstance(part, str) else msgspec.json.encode(part).decode()


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _read_excerpt(stream: Stream, end: OutputEnd, search: str | None, max_bytes: int) -> Excerpt:
    try:
        source = _open(stream)
    except (FileNotFoundError, NotADirectoryError):
        note = f"(its file, {stream.file}, is gone; this was its end)\n"
        known = stream.text[-max(0, max_bytes - len(note)) :]
        return Excerpt("head", note + known, stream.size, left_out=max(0, stream.size - len(known.encode())))
    with source as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - max_bytes) if end == "tail" and search is None else 0)
        if search is None:
            data = file.read(max_bytes)
            return Excerpt(end, data.decode("utf-8", "replace"), size, left_out=size - len(data))
        lines = ((line, f"{number}: ", line.rstrip()) for number, line in _numbered(file))
        return _search(lines, search, max_bytes, size)


def _open(stream: Stream) -> BinaryIO:
    return io.BytesIO(stream.text.encode()) if stream.file is None else Path(stream.file).open("rb")


def _numbered(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1; a very long line comes in pieces."""
    number = 1
    while line := file.readline(_PIECE_BYTES):
        yield number, line.decode("utf-8", "replace")
        number += line.endswith(b"\n")


def _search(lines: Iterable[tuple[str, str, str]], search: str, max_bytes: int, size: int) -> Excerpt:
    """The lines that contain one of the texts: of each line the text to search, the label to show, the text to show."""
    texts = [text.strip() for text in search.casefold().split("|") if text.strip()]
    shown, length, found = [], 0, 0
    for searched, label, line in lines:
        if any(text in searched.casefold() for text in texts):
            found += 1
            row = label + line.encode()[:_LINE_BYTES].decode("utf-8", "ignore")
            length += len(row.encode()) + 1
            shown += [row] if length <= max_bytes else []
    return Excerpt("head", "\n".join(shown), size, found)
