"""Parts of a result with files that need no worker: what the task returned, texts, and JSON in files."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rhapsody_mcp.model.errors import InvalidTask, ResultGone
from rhapsody_mcp.model.json_pointer import split_pointer
from rhapsody_mcp.model.values import Value

__all__ = ["readable_part"]

_MAX_BYTES = 32 * 1024**2
"""A longer file is read by a worker."""
_SVG = ("<svg", "<?xml")


def readable_part(value: Value, path: str) -> tuple[Value, str] | None:
    """The JSON value that the path leads into, and the rest of the path; None where a worker is to look at the part.

    Raises InvalidTask where the path leads into a file that is no JSON, and ResultGone where the file is gone.
    """
    first, *steps = split_pointer(path) or [""]
    if first == "result" and value.inner is not None and value.inner.format == "json":
        return value.inner, _pointer(steps)
    count = next((count for count in range(1, len(steps) + 1) if "/".join(steps[:count]) in value.files), 0)
    if first != "files" or not count:
        return None
    name, rest = "/".join(steps[:count]), steps[count:]
    if (data := _read(value.files[name])) is None:
        return None
    return (_json(data, name), _pointer(rest)) if rest else _text(data)


def _pointer(steps: list[str]) -> str:
    return "".join(f"/{step.replace('~', '~0').replace('/', '~1')}" for step in steps)


def _read(path: str) -> bytes | None:
    try:
        return None if Path(path).stat().st_size > _MAX_BYTES else Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ResultGone(f"the kept file {path} is gone; submit its task again.") from error


def _text(data: bytes) -> tuple[Value, str] | None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if text.lstrip("\ufeff \n").startswith(_SVG):
        return None
    return Value("json", "str", len(data), msgspec.json.encode(text), length=len(text)), ""


def _json(data: bytes, name: str) -> Value:
    try:
        compact = msgspec.json.encode(msgspec.json.decode(data))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidTask(f"the path leads into {name}, which is no JSON: {error}.", field="path") from error
    return Value("json", "", len(compact), compact)
