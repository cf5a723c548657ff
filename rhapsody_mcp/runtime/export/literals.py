"""Writes values and calls as Python code that gives them back."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence

import msgspec

__all__ = ["Code", "write_call", "write_text", "write_value"]

_WIDTH = 110
_INDENT = "    "


class Code(msgspec.Struct, frozen=True):
    """An expression that is written as it is."""

    text: str


def write_value(value: object, special: Callable[[object], str | None] = lambda _: None) -> str:
    """An expression for plain data; `special` writes what it knows better, at any depth, and gives None for the rest.

    Raises TypeError for what is no plain data.
    """
    if isinstance(value, Code):
        return value.text
    if (written := special(value)) is not None:
        return written
    if isinstance(value, list | tuple):
        items = [write_value(item, special) for item in value]
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, dict):
        pairs = (f"{write_value(key, special)}: {write_value(item, special)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as code")


def write_text(text: str) -> str:
    """A text of several lines as a person would write it, if that gives it back; else as one line."""
    if "\n" in text:
        for quotes in ('"""', "'''"):
            written = f"r{quotes}{text}{quotes}" if "\\" in text else f"{quotes}\\\n{text}{quotes}"
            if _evaluates_to(written, text):
                return written
    return repr(text)


def _evaluates_to(written: str, text: str) -> bool:
    try:
        return bool(ast.literal_eval(written) == text)
    except (SyntaxError, ValueError):
        return False


def write_call(name: str, arguments: Sequence[str], depth: int = 0) -> str:
    """A call, on one line where it fits; `depth` is how far its line is indented."""
    line = f"{name}({', '.join(arguments)})"
    if not arguments or (len(line) + depth * len(_INDENT) <= _WIDTH and "\n" not in line):
        return line
    inner = _INDENT * (depth + 1)
    return "\n".join([f"{name}(", *(f"{inner}{argument}," for argument in arguments), f"{_INDENT * depth})"])
