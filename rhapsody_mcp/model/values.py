"""A task's result as it travels: encoded once by whoever made it, opened only where user code may run."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from rhapsody_mcp.model.errors import InvalidTask, ResultGone, nearest

__all__ = [
    *("INLINE_BYTES", "NOTHING", "PLAIN", "PREVIEW_CHARS", "Ref", "Stream", "Value"),
    *("follow", "is_index", "keys_text", "load", "load_json"),
]

PLAIN = frozenset({int, float, str, bool, bytes, type(None)})
"""The types of values that hold nothing else."""
INLINE_BYTES = 64 * 1024
"""A longer value, and a longer stdout or stderr, is a file; messages stay small."""
PREVIEW_CHARS = 8 * 1024


class Ref(msgspec.Struct, frozen=True, tag="ref", gc=False):
    """The result of another task, or the part of it that `path` (a JSON Pointer, RFC 6901) names."""

    uid: str
    path: str = ""


class Value(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An encoded result: JSON where that round-trips exactly, else a pickle.

    Exactly one of `data` and `file` is set. `size` is in bytes. `preview` is empty where the data itself is
    short JSON.
    """

    format: Literal["json", "pickle"]
    type: str
    size: int
    data: bytes | None = None
    file: str | None = None
    length: int | None = None
    preview: str = ""

    def read(self) -> bytes:
        """The encoded bytes. Raises ResultGone where the file is not there any more."""
        if self.data is not None:
            return self.data
        with self.open() as file:
            return file.read()

    def open(self) -> BinaryIO:
        """Its file. Raises ResultGone where that is not there any more."""
        try:
            return Path(self.file or "").open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ResultGone(f"the file of this result, {self.file}, is gone; submit its task again.") from error


NOTHING = Value("json", "nothing", 4, b"null")
"""Stands for the result of a task that ended without one: null, and so is every part of it."""


class Stream(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a program printed: `text`, or the whole in `file` where it is long (`text` is then its end).

    `left_out` counts the bytes that were printed in its middle and are not there, because it was too long.
    """

    text: str = ""
    file: str | None = None
    size: int = 0
    left_out: int = 0

    def read(self) -> str:
        if self.file is None:
            return self.text
        return Path(self.file).read_bytes().decode("utf-8", "replace")


Reader = Callable[[Value], Any]


def load(value: Value) -> Any:
    """The value itself. Unpickles: only for values that this user's own tasks made, in this user's process."""
    if value.format == "json":
        return msgspec.json.decode(value.read())
    if value.file is None:
        return pickle.loads(value.read())
    with value.open() as file:
        return pickle.load(file)  # what is long in it is read into its place, not copied there


def load_json(value: Value) -> Any:
    """The value itself if it is JSON; a pickle is refused, because opening one runs code."""
    if value.format != "json":
        raise InvalidTask(
            f"this result is a Python object of type {value.type}, which only another function can read. "
            "Pass it to a function task, or return plain data (numbers, text, lists, dicts)."
        )
    return msgspec.json.decode(value.read())


def follow(value: Any, path: str) -> Any:
    """The part of `value` that a JSON Pointer names; raises InvalidTask with what is there instead."""
    for step in pointer_steps(path):
        try:
            value = _item(value, step)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            there = keys_text(step, value) if isinstance(value, dict) else f"a {type(value).__name__}"
            if isinstance(value, Sized) and not isinstance(value, dict | str | bytes):
                there += f" of length {len(value)}"
            raise InvalidTask(f"path {path!r} leads nowhere: at {step!r} there is {there}.") from error
    return value


def _item(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value[step] if step in value else {str(key): part for key, part in value.items()}[step]
    if isinstance(value, str | bytes):
        raise TypeError("a text has no parts")
    return value[int(step)]


def keys_text(step: str, keys: Iterable[Any]) -> str:
    """What there is of keys where `step` is none of them; the nearest is looked for among the first thousand."""
    known = list(itertools.islice(keys, 1000))
    return f"a dict with keys {known[:10]}{nearest(step, map(str, known))}"


def is_index(text: str) -> bool:
    """Whether it is a number that something may have; Python refuses to read very long ones."""
    return text.isdecimal() and len(text) <= 18


def pointer_steps(path: str) -> list[str]:
    """A JSON Pointer's steps, unescaped; raises InvalidTask where the path does not start with '/'."""
    if path and not path.startswith("/"):
        raise InvalidTask(f"path {path!r} is not a JSON Pointer: it starts with '/', as in '/0/label'.")
    return [step.replace("~1", "/").replace("~0", "~") for step in path.split("/")[1:]]
