"""Runs what takes long for a large call beside the event loop, so that other clients are served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

__all__ = ["aside", "look_at_size"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_LARGE = 2_000
"""Parts of a call's arguments; what a call of fewer takes is a few milliseconds."""
_TEXT_CHARS = 100
"""So much of a text is a part."""

_is_large: ContextVar[bool] = ContextVar("is_large", default=False)


def look_at_size(arguments: Any) -> None:
    """Have what this call awaits with `aside` run there where these are large."""
    _is_large.set(_has_many_parts(arguments))


async def aside(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What it gives, from a thread for a large call: it changes nothing that the event loop's tasks change too."""
    return await asyncio.to_thread(work, *args, **kwargs) if _is_large.get() else work(*args, **kwargs)


def _has_many_parts(value: Any) -> bool:
    pending, parts = [value], 0
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            parts += len(one) // _TEXT_CHARS
        elif isinstance(one, int):  # which may be a number of items
            parts += one
        elif isinstance(one, dict | list):
            parts += len(one)
            if parts <= _LARGE:
                pending += one.values() if isinstance(one, dict) else one
        if parts > _LARGE:
            return True
    return False
