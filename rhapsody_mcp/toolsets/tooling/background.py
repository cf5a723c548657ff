"""Runs the work of a large call in a thread, so that the event loop serves other clients meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

__all__ = ["measure_call", "to_thread_if_large"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_LARGE = 2_000
"""Parts of a call's arguments; the work for fewer parts takes a few milliseconds."""
_TEXT_CHARS = 100
"""Characters of a text that count as one part."""

_is_large: ContextVar[bool] = ContextVar("is_large", default=False)


def measure_call(arguments: Any) -> None:
    """Decide by the size of its arguments whether `to_thread_if_large` uses a thread in this call."""
    _is_large.set(_has_many_parts(arguments))


async def to_thread_if_large(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The result of `work`, which must not change what tasks of the event loop change too."""
    return await asyncio.to_thread(work, *args, **kwargs) if _is_large.get() else work(*args, **kwargs)


def _has_many_parts(value: Any) -> bool:
    pending, parts = [value], 0
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            parts += len(part) // _TEXT_CHARS
        elif isinstance(part, int):  # perhaps a number of items
            parts += part
        elif isinstance(part, dict | list):
            parts += len(part)
            if parts <= _LARGE:
                pending += part.values() if isinstance(part, dict) else part
        if parts > _LARGE:
            return True
    return False
