"""Shows a Python object that is no JSON, as plain data or as a picture that a worker of the session makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, ResultGone, RhapsodyError
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Value, load_json
from rhapsody_mcp.runtime.serialization import Module
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask
from rhapsody_mcp.toolsets.replies.formatting import shortened
from rhapsody_mcp.toolsets.replies.pagination import Page

__all__ = ["SHOWN", "DescribedResult", "Picture", "view_object"]

_TIMEOUT_S, _PICTURE_TIMEOUT_S = 3.0, 20.0
SHOWN = (512 * 1024, 1568)
"""The most bytes and pixels a side of a picture in a reply: models see no more pixels, and hosts take a megabyte."""
_PICTURE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_REASON_CHARS = 200
_VIEW = Module("rhapsody_mcp.engine.views.inspection:view")
_ERRORS = {error.code: error for error in (InvalidRequest, InvalidTask, ResultGone)}


class DescribedResult(msgspec.Struct, frozen=True):
    """A result that is described, not shown. `why` is the reason; `on_request` says that the agent asked for output
    alone."""

    value: Value
    why: str = ""
    on_request: bool = False


class _View(msgspec.Struct):
    """What `engine.views.inspection.View` holds."""

    type: str
    plain: Any
    total: int | None
    start: int
    about: str
    columns: list[str]


class Picture(msgspec.Struct, frozen=True):
    """What `engine.views.inspection.PictureView` holds."""

    about: str
    mime_type: str
    base64: str
    size: int
    shown: str
    why: str


class _Refusal(msgspec.Struct):
    code: str
    message: str


class _Answer(msgspec.Struct):
    """What `engine.views.inspection.view` returns: one of the three."""

    view: _View | None = None
    picture: Picture | None = None
    refusal: _Refusal | None = None


async def view_object(
    session: Session,
    value: Value,
    path: str,
    start: int | None,
    limit: int | None,
    max_bytes: int,
    picture_bounds: tuple[int, int] = SHOWN,
    software: Mapping[str, Any] = MappingProxyType({}),
) -> Page | Picture | DescribedResult:
    """A page of a plain view of the object, or of the part at a JSON Pointer; a picture, where that is one. `software`
    is that of the task that has made the object.

    Raises InvalidTask where there is nothing at the path, InvalidRequest where there is nothing at the start, and
    ResultGone where the file is gone.
    """
    if value.type == "bytes" and not path and not value.is_picture:
        return DescribedResult(value)
    arguments = (value, path, start, limit, max_bytes, picture_bounds)
    task = ComputeTask(_VIEW, args=arguments, task_backend_specific_kwargs=software)
    may_be_picture = value.is_picture or (path and (value.format == "files" or " picture" in value.preview))
    timeout_s = _PICTURE_TIMEOUT_S if may_be_picture else _TIMEOUT_S
    try:
        async with asyncio.timeout(timeout_s):
            await session.run_hidden(task)
    except TimeoutError:
        slow = "no worker was free to look at it" if task.started is None else "a worker did not read it"
        return DescribedResult(value, f"{slow} within {timeout_s:g} s")
    except RhapsodyError as error:
        return DescribedResult(value, _reason(str(error)))
    if task.state is not TaskState.DONE:
        return DescribedResult(value, _reason(task.outcome.error if task.outcome else ""))
    answer = await asyncio.to_thread(_take_answer, task)
    if answer.refusal is not None:
        return DescribedResult(value, _raise_known(answer.refusal))
    if (picture := answer.picture) is not None:
        is_usable = picture.mime_type in _PICTURE_TYPES and len(picture.base64) <= 2 * picture_bounds[0]
        return picture if is_usable else DescribedResult(value, "what a worker drew is no picture")
    return DescribedResult(value, "no worker could look at it") if answer.view is None else _page(answer.view, value)


def _take_answer(task: ComputeTask) -> _Answer:
    """The answer; the file of a long one is deleted."""
    if task.outcome is None or (value := task.outcome.value) is None:
        return _Answer()
    try:
        return msgspec.convert(load_json(value), _Answer)
    except (RhapsodyError, msgspec.ValidationError):
        return _Answer()
    finally:
        if value.file is not None:
            Path(value.file).unlink(missing_ok=True)


def _raise_known(refusal: _Refusal) -> str:
    """Raise the error with this code; the reason where no error that the agent can correct has the code."""
    if (error := _ERRORS.get(refusal.code)) is not None:
        raise error(refusal.message)
    return _reason(refusal.message)


def _reason(message: str) -> str:
    return shortened(message.rstrip("."), _REASON_CHARS)


def _page(view: _View, value: Value) -> Page:
    plain = view.plain
    kind = type(plain).__name__
    page = Page(
        kind, value.size, view.total, view.start, view_of=view.type, about=view.about, columns=tuple(view.columns)
    )
    if isinstance(plain, str) and view.total is not None:
        return msgspec.structs.replace(page, text=plain)
    if isinstance(plain, list) and view.total is not None:
        pieces = tuple(msgspec.json.encode(item) for item in plain)
    elif isinstance(plain, dict) and view.total is not None:
        pieces = tuple(msgspec.json.encode({key: item})[1:-1] for key, item in plain.items())
    else:
        pieces = (msgspec.json.encode(plain),)
    return msgspec.structs.replace(page, pieces=pieces)
