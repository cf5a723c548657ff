"""Long work on the event loop in short steps, so that a service answers its other clients in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["TASKS_PER_STEP", "steps"]

_T = TypeVar("_T")
TASKS_PER_STEP = 250
"""How many tasks are taken, queued, handed to a backend or ended in one step: about 5 ms."""


def steps(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The items in their order, as many at a time as one step takes."""
    return (items[start : start + TASKS_PER_STEP] for start in range(0, len(items), TASKS_PER_STEP))
