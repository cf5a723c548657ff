"""Keeps tasks from their start until whoever records starts has recorded them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from rhapsody_mcp.backends.base import BeforeStart
from rhapsody_mcp.backends.compute.in_flight import InFlightTask

__all__ = ["StartGate"]

_AHEAD = 512
"""Tasks per record: those that start now, and the next in the queue."""
_VALID_S = 1.0
"""How long a permission stays valid, in seconds: later, the ledger may not be writable any more."""


class StartGate:
    """Asks `before_start`, where there is one, for batches of tasks."""

    def __init__(self, before_start: BeforeStart | None) -> None:
        self._before_start = before_start

    def let_through(
        self, tasks: Sequence[InFlightTask], queue: Sequence[InFlightTask], start: Callable[[], None]
    ) -> None:
        """Call `start` once these tasks may start; never where one may not. The next tasks of the queue are asked for
        together with these."""
        if self._before_start is None:
            start()
            return
        self._ask(self._before_start, tasks, queue)
        permissions = {task.permission for task in tasks if task.permission is not None}
        if not all(permission.done() for permission in permissions):
            asyncio.gather(*permissions).add_done_callback(lambda answers: start() if all(answers.result()) else None)
        elif all(permission.result() for permission in permissions):
            start()

    def _ask(self, before_start: BeforeStart, tasks: Sequence[InFlightTask], queue: Sequence[InFlightTask]) -> None:
        now, middle = asyncio.get_running_loop().time(), _AHEAD // 2
        further = [queue[middle]] if len(queue) > middle else []
        if not any(_has_to_ask(task, now) for task in (*tasks, *further)):
            return
        nearest = itertools.chain(tasks, itertools.islice(queue, _AHEAD))
        asking = [task for task in nearest if _has_to_ask(task, now)]
        permission = asyncio.ensure_future(before_start([task.uid for task in asking]))
        for task in asking:
            task.permission, task.permission_asked = permission, now


def _has_to_ask(task: InFlightTask, now: float) -> bool:
    """Whether `before_start` was not asked for this task, or its answer is too old."""
    return task.permission is None or (now - task.permission_asked > _VALID_S and task.permission.done())
