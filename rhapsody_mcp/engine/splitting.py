"""Makes a list of a result that is no JSON, where its objects can be opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["as_list"]


def as_list(value: Any) -> list[Any]:
    """The items in order: of an array as plain numbers, of a set sorted where that is possible.

    Raises TypeError for what is no list and nothing like one.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"the result is of type {type(value).__name__}")
    if hasattr(value, "tolist"):
        listed = value.tolist()
        return listed if isinstance(listed, list) else [listed]
    if not isinstance(value, set | frozenset):
        return list(value)
    try:
        return sorted(value)
    except TypeError:
        return list(value)
