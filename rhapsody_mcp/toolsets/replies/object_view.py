"""Looks at a result that is no JSON where it can be opened: on a worker of the session."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, ResultGone, RhapsodyError
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Value, load_json
from rhapsody_mcp.runtime.serialization import Module
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask
from rhapsody_mcp.toolsets.replies.base import shortened
from rhapsody_mcp.toolsets.replies.pagination import Page

__all__ = ["Opaque", "view_object"]

_TIMEOUT_S = 3.0
_WHY_CHARS = 200
_VIEW = Module("rhapsody_mcp.engine.task.inspection:view")


class Opaque(msgspec.Struct, frozen=True):
    """A result that is not shown, and why not; or nobody asked to see it."""

    value: Value
    why: str = ""
    only_described: bool = False


class _View(msgspec.Struct):
    """What a worker says of an object."""

    type: str
    plain: Any
    total: int | None
    start: int


async def view_object(
    session: Session, value: Value, path: str, start: int | None, limit: int | None, max_bytes: int
) -> Page | Opaque:
    """A page of a plain view of the object, or of a part of it.

    Raises InvalidTask for a path and InvalidRequest for a start that leads nowhere.
    """
    if value.type == "bytes" and not path:
        return Opaque(value)
    task = ComputeTask(_VIEW, args=(value, path, start, limit, max_bytes))
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await session.run_hidden(task)
    except TimeoutError:
        slow = "no worker was free to look at it" if task.started is None else "a worker did not read it"
        return Opaque(value, f"{slow} within {_TIMEOUT_S:g} s")
    except RhapsodyError as error:
        return Opaque(value, shortened(str(error).rstrip("."), _WHY_CHARS))
    if task.state is not TaskState.DONE:
        return Opaque(value, _why_not(task))
    try:
        seen = msgspec.convert(load_json(task.outcome.value), _View) if task.outcome and task.outcome.value else None
    except (RhapsodyError, msgspec.ValidationError):
        seen = None
    return Opaque(value, "no worker could look at it") if seen is None else _page(seen, value)


def _why_not(task: ComputeTask) -> str:
    error = task.outcome.error if task.outcome else ""
    kind, _, message = error.partition(": ")
    if kind == "InvalidTask":
        raise InvalidTask(message)
    if kind == "ResultGone":
        raise ResultGone(message)
    if kind == "InvalidRequest":
        raise InvalidRequest(message)
    return shortened(error.rstrip("."), _WHY_CHARS)


def _page(seen: _View, value: Value) -> Page:
    plain = seen.plain
    page = Page(type(plain).__name__, value.size, seen.total, seen.start, view_of=seen.type)
    if isinstance(plain, str) and seen.total is not None:
        return msgspec.structs.replace(page, text=plain)
    if isinstance(plain, list) and seen.total is not None:
        pieces = tuple(msgspec.json.encode(item) for item in plain)
    elif isinstance(plain, dict) and seen.total is not None:
        pieces = tuple(msgspec.json.encode({key: item})[1:-1] for key, item in plain.items())
    else:
        pieces = (msgspec.json.encode(plain),)
    return msgspec.structs.replace(page, pieces=pieces)
