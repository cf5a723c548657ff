"""Short views of results and of what tasks printed: bounded, whatever their size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import msgspec

from rhapsody_mcp.model.values import Stream, Value, follow, load_json

__all__ = ["Preview", "preview_json", "preview_part", "preview_value", "tail"]

T = TypeVar("T")


class Preview(msgspec.Struct, frozen=True):
    """`text` is the whole of the result, as JSON, where it is `complete`; then `value` is the result itself.

    An `opaque` result is a Python object; its text is what its repr says. `size` is in bytes; `length` is the
    number of items, where there are any.
    """

    text: str
    complete: bool
    type: str
    size: int
    value: Any = None
    length: int | None = None
    opaque: bool = False

    @property
    def described(self) -> str:
        """As in `list of 1000 items, 52301 bytes`."""
        items = "" if self.length is None or self.type == "str" else f" of {self.length} items"
        return f"{self.type}{items}, {self.size} bytes"


def preview_value(value: Value, max_chars: int) -> Preview:
    """Reads no file: a result that lies in one is shown by the preview that came with it."""
    if value.format == "json" and value.data is not None:
        return preview_json(value.data, max_chars, value.type, value.length)
    opaque = value.format == "pickle"
    text = value.preview
    if not opaque and value.type == "str" and not text.startswith('"'):  # a program's: the text as it is
        text = msgspec.json.encode(text).decode()[:-1]
    return Preview(text[:max_chars], False, value.type, value.size, length=value.length, opaque=opaque)


def preview_json(data: bytes, max_chars: int, type: str, length: int | None = None) -> Preview:
    text = data.decode()
    if len(text) <= max_chars:
        return Preview(text, True, type, len(data), msgspec.json.decode(data), length)
    return Preview(text[:max_chars], False, type, len(data), length=length)


async def preview_part(value: Value, path: str, max_chars: int) -> Preview:
    """The part of a result that a JSON Pointer names. Raises InvalidTask where it leads nowhere."""
    if not path:
        return await _preview_whole(value, max_chars)
    part = await _in_thread_if(value.file is not None, lambda: follow(load_json(value), path))
    length = len(part) if isinstance(part, list | dict) else None
    return preview_json(msgspec.json.encode(part), max_chars, type(part).__name__, length)


async def _preview_whole(value: Value, max_chars: int) -> Preview:
    shown = preview_value(value, max_chars)
    if value.format == "pickle" or value.file is None or len(value.preview) >= max_chars:
        return shown
    head = await anyio.to_thread.run_sync(_head_of_file, Path(value.file), max_chars)
    return msgspec.structs.replace(shown, text=head)


async def tail(stream: Stream, max_bytes: int) -> str:
    """The end of what was printed."""
    if stream.file is None or len(stream.text.encode()) >= max_bytes:
        return _last(stream.text.encode(), max_bytes)
    return await anyio.to_thread.run_sync(_tail_of_file, Path(stream.file), max_bytes)


def _head_of_file(file: Path, max_bytes: int) -> str:
    with file.open("rb") as opened:
        return opened.read(max_bytes).decode("utf-8", "ignore")


def _tail_of_file(file: Path, max_bytes: int) -> str:
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - max_bytes))
        return opened.read(max_bytes).decode("utf-8", "replace")


def _last(data: bytes, max_bytes: int) -> str:
    return data[-max_bytes:].decode("utf-8", "replace") if max_bytes else ""


async def _in_thread_if(long: bool, work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work) if long else work()
