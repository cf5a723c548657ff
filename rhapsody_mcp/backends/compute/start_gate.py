"""Holds tasks back until `before_start` has recorded that they may start, and while the scheduler may end the job."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Callable, Sequence

from rhapsody_mcp.backends.base import BeforeStart
from rhapsody_mcp.backends.compute.in_flight import InFlightTask

__all__ = ["StartGate"]

_QUEUED_PER_REQUEST = 512
"""How many queued tasks are recorded together with the tasks that start now: one record costs a write to the disk."""
_VALID_S = 1.0
"""How long an answer of `before_start` stays valid, in seconds: later, the ledger may have become read-only."""
_PAUSE_S = 2.0
"""A scheduler that ends a job sends SIGTERM to its processes one after the other, and to those of a busy node later."""
_PAUSES_APART_S = 60.0
"""Where the job went on after a pause, the next SIGTERM is not the scheduler's."""


class StartGate:
    """Asks `before_start` for permission to start tasks, many tasks at a time; without `before_start` all may start."""

    def __init__(self, before_start: BeforeStart | None) -> None:
        self._before_start = before_start
        self._paused_until = float("-inf")

    def process_ended(self, exit_code: int | None) -> None:
        """A process has ended that the engine had not ended. After a SIGTERM, no task starts for a moment: if the
        scheduler is ending the job, what has not started is not lost with it."""
        now = asyncio.get_running_loop().time()
        if exit_code == -signal.SIGTERM and now > self._paused_until + _PAUSES_APART_S:
            self._paused_until = now + _PAUSE_S

    def let_through(
        self, tasks: Sequence[InFlightTask], queue: Sequence[InFlightTask], start: Callable[[], None]
    ) -> None:
        """Call `start` once all these tasks may start; never where one of them may not.

        Permission for the next tasks of `queue` is asked for in the same request.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._paused_until:
            loop.call_at(self._paused_until, self.let_through, tasks, queue, start)
            return
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
        now, middle = asyncio.get_running_loop().time(), _QUEUED_PER_REQUEST // 2
        further = [queue[middle]] if len(queue) > middle else []
        if not any(_needs_permission(task, now) for task in (*tasks, *further)):
            return
        nearest = itertools.chain(tasks, itertools.islice(queue, _QUEUED_PER_REQUEST))
        unpermitted = [task for task in nearest if _needs_permission(task, now)]
        permission = asyncio.ensure_future(before_start([task.uid for task in unpermitted]))
        for task in unpermitted:
            task.permission, task.permission_asked = permission, now


def _needs_permission(task: InFlightTask, now: float) -> bool:
    """Whether the task has no permission yet, or one that is too old."""
    return task.permission is None or (now - task.permission_asked > _VALID_S and task.permission.done())
