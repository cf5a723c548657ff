"""JSON Pointers (RFC 6901) into results."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.values import KeptFiles

__all__ = ["describe_keys", "read_kept", "resolve_pointer", "split_pointer"]

_MAX_KEYS = 1000
_MAX_CHARS = 1_000_000
"""Of a file that goes into a text."""


def resolve_pointer(value: Any, path: str, *, contents: bool = False) -> Any:
    """The part of `value` at the path, which may lead on into a kept file that holds JSON; with `contents`, the text of
    a kept file in the place of its path. Raises InvalidTask, which describes the last part that exists."""
    before: Any = None
    for step in split_pointer(path):
        before, value = value, read_kept(value, before)
        try:
            value = _part(value, step)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            there = describe_keys(step, value) if isinstance(value, dict) else f"a {type(value).__name__}"
            if isinstance(value, Sized) and not isinstance(value, dict | str | bytes):
                there += f" of length {len(value)}"
            raise InvalidTask(f"path {path!r} leads nowhere: at {step!r} there is {there}.", field="path") from error
    is_file = contents and isinstance(before, KeptFiles) and isinstance(value, str)
    return _text_of(value) if is_file else value


def _text_of(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTask(f"the file at the path is not read as text: {error}.", field="path") from error
    if len(text) > _MAX_CHARS:
        raise InvalidTask(f"the file at the path has more than {_MAX_CHARS:,} characters.", field="path")
    return text


def read_kept(value: Any, folder: Any) -> Any:
    """The JSON of a kept file, where the value is the path of one in `folder`; any other value unchanged. Raises
    InvalidTask where the file holds no JSON."""
    if not isinstance(folder, KeptFiles) or not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(Path(value).read_bytes())
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidTask(f"the path leads into a file that is not read as JSON: {error}.", field="path") from error


def _part(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value[step] if step in value else {str(key): part for key, part in value.items()}[step]
    if isinstance(value, str | bytes):
        raise TypeError("a text has no parts")
    return value[int(step)]


def describe_keys(step: str, keys: Iterable[Any]) -> str:
    """Describes a dict that lacks the key `step`, with the nearest of its first thousand keys."""
    first_keys = list(itertools.islice(keys, _MAX_KEYS))
    return f"a dict with keys {first_keys[:10]}{nearest(step, map(str, first_keys))}"


def split_pointer(path: str) -> list[str]:
    """The pointer's steps, unescaped. Raises InvalidTask where a path that is not empty does not start with '/'."""
    if path and not path.startswith("/"):
        raise InvalidTask(f"path {path!r} is not a JSON Pointer: it starts with '/', as in '/0/label'.", field="path")
    return [step.replace("~1", "/").replace("~0", "~") for step in path.split("/")[1:]]
