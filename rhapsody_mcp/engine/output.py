"""What a program printed, and files that appear whole."""

from __future__ import annotations

import os
import tempfile

from rhapsody_mcp.model.values import INLINE_BYTES, Stream

__all__ = ["as_stream", "move_stream", "write_file"]

_TAIL_BYTES = INLINE_BYTES // 4


def write_file(data: bytes, folder: str) -> str:
    """Write a file that appears whole or not at all, and give its path."""
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    with open(handle, "wb") as file:
        file.write(data)
    path = temporary.removesuffix(".part") + ".value"
    os.rename(temporary, path)
    return path


def as_stream(data: bytes, folder: str) -> Stream:
    """Output as it travels: whole where it is short, else in a file of `folder`."""
    if len(data) <= INLINE_BYTES:
        return Stream(_text(data), None, len(data))
    return Stream(_text(data[-_TAIL_BYTES:]), write_file(data, folder), len(data))


def move_stream(path: str, folder: str) -> Stream:
    """The same for output that is in a file already, which is gone afterwards."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _TAIL_BYTES) if size > INLINE_BYTES else 0)
        text = _text(file.read(INLINE_BYTES))
    if size <= INLINE_BYTES:
        os.unlink(path)
        return Stream(text, None, size)
    handle, kept = tempfile.mkstemp(dir=folder, suffix=".output")
    os.close(handle)
    os.rename(path, kept)
    return Stream(text, kept, size)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
