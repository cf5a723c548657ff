"""What a program gets as an argument for a task's result: text as it is, bytes as they are, anything else as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.specs import Command, Content, parts_of
from rhapsody_mcp.model.values import NOTHING, Reader, Ref, Value

__all__ = ["arguments_of"]


def arguments_of(work: Command, bindings: Mapping[str, Value], read: Reader) -> list[str]:
    """The program's name first. Raises InvalidTask where there is no such part of a result, or none that a program can
    get; `read` raises what it raises."""
    return [work.executable, *(_joined(argument, bindings, read) for argument in work.arguments)]


def _joined(argument: Content, bindings: Mapping[str, Value], read: Reader) -> str:
    return "".join(_text(part, bindings, read) for part in parts_of(argument))


def _text(argument: str | Ref, bindings: Mapping[str, Value], read: Reader) -> str:
    if isinstance(argument, str):
        return argument
    bound = bindings[argument.uid]
    value = None if bound == NOTHING else resolve_pointer(read(bound), argument.path)
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError) as error:
        of = f"{argument.uid} at {argument.path}" if argument.path else argument.uid
        raise InvalidTask(
            f"the result of {of}, a {type(value).__name__}, is no argument for a program: {error}. Return plain data: "
            "numbers, text, lists, dicts."
        ) from error


def _plain(item: Any) -> Any:
    """What JSON has for it; NumPy's arrays and numbers, and what is like them, are lists and numbers."""
    if isinstance(item, PurePath):
        return str(item)
    if callable(tolist := getattr(item, "tolist", None)):
        return tolist()
    return msgspec.to_builtins(item)
