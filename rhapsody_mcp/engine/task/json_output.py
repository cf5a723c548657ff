"""The value of a program whose standard output is one JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import msgspec

from rhapsody_mcp.engine.task.output import write_file
from rhapsody_mcp.model.values import INLINE_BYTES, PREVIEW_CHARS, Stream, Value

__all__ = ["NotJson", "json_value"]

_DECODED_BYTES = 32 * 1024**2
"""A longer document is checked without making its objects, which would take ten times the memory."""
_BEGINNING = 200


class NotJson(Exception):
    """Raised with the reason, the position, and the beginning of the output."""


def json_value(printed: BinaryIO, stdout: Stream, folder: str) -> Value:
    """Return what the output says, as a value; a long one is stored in a file of `folder`. Raises NotJson."""
    if stdout.left_out:
        raise NotJson(
            f"its standard output, which is to be JSON, was longer than the limit: {stdout.left_out} bytes are gone. "
            "Let it write a file, and collect that with outputs."
        )
    data = Path(stdout.file).read_bytes() if stdout.file is not None else printed.read(INLINE_BYTES)
    try:
        compact, kind, length = _compact(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NotJson(_reason(data, error)) from None
    if len(compact) <= INLINE_BYTES:
        return Value("json", kind, len(compact), compact, length=length)
    preview = compact[:PREVIEW_CHARS].decode("utf-8", "ignore")
    return Value("json", kind, len(compact), None, write_file(compact, folder), length, preview)


def _compact(data: bytes) -> tuple[bytes, str, int | None]:
    """Return the document without white space between its tokens, with its type and length."""
    if len(data) > _DECODED_BYTES:
        data.decode()
        compact = msgspec.json.format(bytes(msgspec.json.decode(data, type=msgspec.Raw)), indent=-1)
        return compact, {b"{": "dict", b"[": "list"}.get(compact[:1], "str"), None
    value = msgspec.json.decode(data)
    return msgspec.json.format(data, indent=-1), type(value).__name__, len(value) if hasattr(value, "__len__") else None


def _reason(data: bytes, error: Exception) -> str:
    text = data.decode("utf-8", "replace")
    if not text.strip():
        return (
            'its standard output, which is to be JSON, is empty. Print one JSON document, or leave stdout: "json" out.'
        )
    place, problem = _place(data, text, error)
    at = max(0, place - _BEGINNING // 4)
    around = f" There: {text[at : at + _BEGINNING // 2]!r}." if place > _BEGINNING // 2 else ""
    return (
        f"its standard output, which is to be one JSON document, is none: {problem}. It begins: "
        f"{text[:_BEGINNING]!r}.{around} Print everything else on stderr."
    )


def _place(data: bytes, text: str, error: Exception) -> tuple[int, str]:
    """Return where the document goes wrong, in characters, and a sentence on it."""
    import json  # its errors name a line and a column; the import takes some milliseconds

    try:
        json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as found:
        return found.pos, f"{found.msg} at line {found.lineno}, column {found.colno}"
    except (ValueError, RecursionError) as found:
        return 0, str(found)
    return 0, str(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; print null in its place")
