"""Converts results of other tasks to arguments of a program: text stays text, bytes stay bytes, other values become
JSON."""

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
    """Return the argument list, the program's name first. Raises InvalidTask if a JSON Pointer does not exist in a
    result, or if the value has no form as an argument; also raises every error of `read`."""
    return [work.executable, *(_argument_text(argument, bindings, read) for argument in work.arguments)]


def _argument_text(argument: Content, bindings: Mapping[str, Value], read: Reader) -> str:
    return "".join(_part_text(part, bindings, read) for part in parts_of(argument))


def _part_text(argument: str | Ref, bindings: Mapping[str, Value], read: Reader) -> str:
    if isinstance(argument, str):
        return argument
    bound = bindings[argument.uid]
    value = None if bound == NOTHING else resolve_pointer(read(bound), argument.path)
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_json_default)
    except (TypeError, ValueError) as error:
        of = f"{argument.uid} at {argument.path}" if argument.path else argument.uid
        raise InvalidTask(
            f"the result of {of}, a {type(value).__name__}, is no argument for a program: {error}. Return plain data: "
            "numbers, text, lists, dicts."
        ) from error


def _json_default(item: Any) -> Any:
    """Convert an object that JSON does not know: a path to text, a NumPy array or scalar to lists and numbers."""
    if isinstance(item, PurePath):
        return str(item)
    if callable(tolist := getattr(item, "tolist", None)):
        return tolist()
    return msgspec.to_builtins(item)
