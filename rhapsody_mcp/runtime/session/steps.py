"""Splits long work on the event loop into short steps, between which a service answers other clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["TASKS_PER_STEP", "steps"]

_T = TypeVar("_T")
TASKS_PER_STEP = 250
"""How many tasks are submitted, queued or ended in one step. A step takes about 5 ms."""


def steps(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The items in order, in slices of one step."""
    return (items[start : start + TASKS_PER_STEP] for start in range(0, len(items), TASKS_PER_STEP))
