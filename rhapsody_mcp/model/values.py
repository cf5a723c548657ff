"""Encoded results. A result is encoded once, and a pickle is decoded only where user code may run."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from rhapsody_mcp.model.errors import InvalidTask, ResultGone

__all__ = [
    *("INLINE_BYTES", "NOTHING", "PLAIN", "PREVIEW_CHARS", "KeptFiles", "Ref", "Stream", "Value"),
    *("as_tree", "holds_code", "is_index", "load", "load_json", "may_hold_code", "preview_text", "version_here"),
]

PLAIN = frozenset({int, float, str, bool, bytes, type(None)})
"""The types of values that contain no other values."""
INLINE_BYTES = 64 * 1024
"""Values and outputs over this size are stored in files, so that messages stay small."""
PREVIEW_CHARS = 8 * 1024


class Ref(msgspec.Struct, frozen=True, tag="ref", gc=False):
    """A reference to the result of a task, or to the part of the result at `path`, a JSON Pointer (RFC 6901)."""

    uid: str
    path: str = ""


class Value(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An encoded result: as JSON where JSON gives back an equal result, else as a pickle. The format "files" stands for
    {"result": `inner`, "files": KeptFiles}, with the paths of copies by the names of the files, or for a list of
    `items`, among which are such.

    One of `data`, `file`, `inner` and `items` is set. `size` is in bytes. `preview` is empty for short JSON data.
    `about` describes a picture, a table, an array or files, as in `PNG picture 640x480, 31 KB`; else it is empty.
    `python` is the version of the only Python that can read a pickle, as in "3.12", because it holds code; else empty.
    """

    format: Literal["json", "pickle", "files"]
    type: str
    size: int
    data: bytes | None = None
    file: str | None = None
    length: int | None = None
    preview: str = ""
    about: str = ""
    inner: Value | None = None
    files: dict[str, str] = {}
    items: tuple[Value, ...] = ()
    python: str = ""

    @property
    def paths(self) -> list[str]:
        """The paths of all files that hold a part of the result."""
        own = [] if self.file is None else [self.file]
        inside = [self.inner, *self.items] if self.inner else self.items
        return [*own, *self.files.values(), *(path for value in inside for path in value.paths)]

    def moved(self, copies: Mapping[str, str]) -> Value:
        """The value with other paths in the place of its own, by its own."""
        return msgspec.structs.replace(
            self,
            file=None if self.file is None else copies[self.file],
            inner=self.inner and self.inner.moved(copies),
            files={name: copies[path] for name, path in self.files.items()},
            items=tuple(item.moved(copies) for item in self.items),
        )

    @property
    def is_picture(self) -> bool:
        return " picture" in self.about

    def read(self) -> bytes:
        """The encoded bytes. Raises ResultGone where the file no longer exists."""
        if self.data is not None:
            return self.data
        with self.open() as file:
            return file.read()

    def open(self) -> BinaryIO:
        """The open file. Raises ResultGone where the file no longer exists."""
        try:
            return Path(self.file or "").open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ResultGone(f"the file of this result, {self.file}, is gone; submit its task again.") from error


def preview_text(value: Value, most: int) -> str:
    """The beginning of a result, or what it is; no file is read and nothing is unpickled."""
    text = value.data.decode("utf-8", "replace") if value.format == "json" and value.data is not None else value.preview
    what = value.about or f"{value.type}, {value.size} bytes"
    if not text or value.is_picture:
        return f"({what})"
    return text if len(text) <= most and value.file is None else f"{text[:most]} ... ({what})"


NOTHING = Value("json", "nothing", 4, b"null")
"""Stands for the result of a task that ended without a result. Each part of it is null too."""


class Stream(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The stdout or stderr of a task: the whole as `text`; of long output its end, and the whole in `file`.

    `size` is in bytes. `left_out` is the number of bytes that were dropped from the middle of output over the limit.
    """

    text: str = ""
    file: str | None = None
    size: int = 0
    left_out: int = 0

    def read(self) -> str:
        if self.file is None:
            return self.text
        return Path(self.file).read_bytes().decode("utf-8", "replace")


def gap_note(left_out: int) -> bytes:
    """The line in the place of so many bytes that are left out of an output."""
    return f"\n[... {left_out} bytes left out here ...]\n".encode()


Reader = Callable[[Value], Any]


def version_here() -> str:
    """The version of this Python, as in "3.11": functions and classes that are pickled as code need the same."""
    return "{}.{}".format(*sys.version_info)


def holds_code(pickled: bytes | BinaryIO) -> bool:
    """Whether a pickle holds a function or a class as code: whether it names cloudpickle's maker of functions."""
    if isinstance(pickled, bytes) and not may_hold_code(pickled):
        return False
    from pickletools import genops  # here: it is seldom needed

    text = ""
    for operation, argument, _ in genops(pickled):
        if operation.name == "STACK_GLOBAL" and text == _CODE:
            return True
        text = argument if isinstance(argument, str) else text
    return False


def may_hold_code(piece: bytes) -> bool:
    """Whether a pickle, of which this is a piece, may hold code; of a text that names the maker, it is true too."""
    return _CODE.encode() in piece


_CODE = "_make_function"


def load(value: Value) -> Any:
    """Decode a value. This may unpickle: call it only for values of the user's own tasks, in a process of the user."""
    if value.format == "files":
        return _with_files(value, load)
    if value.format == "json":
        return msgspec.json.decode(value.read())
    if value.python and value.python != version_here():
        raise InvalidTask(
            f"this result is a {value.type} that holds functions or classes of Python {value.python}, which Python "
            f"{version_here()} cannot read. Give the task that reads it the same python, or return plain data."
        )
    if value.file is None:
        return pickle.loads(value.read())
    with value.open() as file:
        return pickle.load(file)  # reads large buffers in place, without a copy


def load_json(value: Value) -> Any:
    """Decode a JSON value. Raises InvalidTask for a pickle, because unpickling runs code."""
    if value.format == "files":
        return _with_files(value, load_json)
    if value.format != "json":
        raise InvalidTask(
            f"this result is a Python object of type {value.type}, which only another function can read. "
            "Pass it to a function task, or return plain data (numbers, text, lists, dicts)."
        )
    return msgspec.json.decode(value.read())


class KeptFiles(dict[str, Any]):
    """The paths of copies of files, by the names of the files; a folder is one more of these."""


def _with_files(value: Value, read: Reader) -> Any:
    """The object that the value stands for, without a result that only other functions can read."""
    if value.inner is None:
        return [read(item) for item in value.items]
    files = {"files": as_tree(value.files)}
    if value.inner.format == "pickle" and read is load_json:
        return files
    return {"result": read(value.inner), **files}


def as_tree(files: Mapping[str, str]) -> KeptFiles:
    """What there is for each file, in a tree of folders."""
    tree = KeptFiles()
    for name, what in files.items():
        *folders, last = name.split("/")
        folder = tree
        for step in folders:
            folder = folder.setdefault(step, KeptFiles())
        folder[last] = what
    return tree


def is_index(text: str) -> bool:
    """Whether the text is a decimal number of at most 18 digits; int() refuses very long ones."""
    return text.isdecimal() and len(text) <= 18
