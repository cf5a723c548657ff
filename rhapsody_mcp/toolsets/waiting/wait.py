"""Waits for selected tasks within a bound, and reports progress meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio

from rhapsody_mcp.model.live.progress import progress_text
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import Task, leaves, name_of
from rhapsody_mcp.toolsets.waiting.selection import SelectedTasks, has_children
from rhapsody_mcp.toolsets.waiting.until import Answer, Condition

__all__ = ["ChangeSignal", "tick_text", "wait_for"]

_TICK_S = 1.0
_LOOK_S = 0.25
"""Seconds between two looks at what tasks tell and print."""
_SHORTEST_LOOK_S = 0.5
"""Seconds that a look has also at the end of a wait."""
_TOLD = 3


class ChangeSignal:
    """Wakes the waits for a session when a task of the session ends, or the session changes as a whole."""

    def __init__(self) -> None:
        self._events: dict[OpenSession, asyncio.Event] = {}

    def notify(self, open_session: OpenSession, task: Task | None) -> None:
        """Tell of a change of this task, or of the session where `task` is None."""
        if (task is None or task.state.final) and (event := self._events.pop(open_session, None)):
            event.set()

    async def wait(self, open_session: OpenSession) -> None:
        await self._events.setdefault(open_session, asyncio.Event()).wait()


async def wait_for(
    selected: SelectedTasks,
    signal: ChangeSignal,
    *,
    count: int | None,
    timeout_s: float,
    started: float,
    tick: Callable[[float], Awaitable[None]],
    condition: Condition | None = None,
) -> tuple[float, Answer | None]:
    """Return when all selected tasks have ended, or `count` of them more, or the condition has its answer, or
    `timeout_s` after `started` by the event loop's clock. The result is the seconds waited, and the answer.

    `tick` is called about once a second with the seconds waited so far, and is canceled at the end of the wait. To
    cancel a wait cancels no task.
    """
    now = asyncio.get_running_loop().time
    progress, until_s = _Progress(selected), started + timeout_s
    last_tick, next_look = -_TICK_S, 0.0
    while True:
        answer, is_over = None, progress.is_enough(count) or now() >= until_s
        if condition is not None and (is_over or condition.has_ended or now() >= next_look):
            with anyio.move_on_after(max(_SHORTEST_LOOK_S, until_s - now())):  # what has to be read may not answer
                answer = await condition.answer()
            next_look = now() + _LOOK_S
        if answer is not None or is_over or (left := until_s - now()) <= 0:
            return now() - started, answer
        if now() - started - last_tick >= _TICK_S:
            last_tick = now() - started
            with anyio.move_on_after(left):  # a client that does not read must not hold up its own reply
                await tick(last_tick)
        with anyio.move_on_after(min(_TICK_S if condition is None else _LOOK_S, left)):
            await signal.wait(selected.open_session)


class _Progress:
    """Counts ended tasks, and looks at each task once however often it is asked."""

    def __init__(self, selected: SelectedTasks) -> None:
        self._selected, self._seen, self._count = selected, selected.counted_from, 0
        self._open = list(selected.until)

    def is_enough(self, count: int | None) -> bool:
        while self._open and self._open[-1].state.final:
            self._open.pop()
        return not self._open or (count is not None and self._ended() >= count)

    def _ended(self) -> int:
        self._count += sum(not has_children(task) for _, task in self._selected.ended(self._seen))
        self._seen = len(self._selected.open_session.session.ended)
        return self._count


def tick_text(selected: SelectedTasks) -> str:
    """As in `3 of 5 ended; train: 3 of 20, loss 0.4; vllm: loading the model`."""
    tasks = list(leaves(selected.awaited))
    telling = [task for task in tasks if task.progress is not None and task.state is TaskState.RUNNING]
    told = [f"{name_of(task)}: {progress_text(task.progress)}" for task in telling[:_TOLD] if task.progress is not None]
    states = [f"{name}: {state}" for name, state in selected.open_session.session.engines.items()]
    return "; ".join([f"{sum(task.state.final for task in tasks)} of {len(tasks)} ended", *told, *states])
