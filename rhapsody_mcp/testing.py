"""A scripted backend: runs functions in this process, in memory, for tests of what is built on a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import msgspec

from rhapsody_mcp.backends.base import Awaitable, Ended, Kind, Report, Running
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Order, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader, Value

__all__ = ["ScriptedBackend"]

Script = Callable[[TaskSpec, list[Any]], Any]


class ScriptedBackend(Awaitable):
    """Answers each task with what `script(spec, values)` returns; what it raises makes the task FAILED.

    A script that returns an Outcome gives the whole of what came of the task. `values` are the results that the
    task refers to, in the order of their uids. While `gate` is clear, tasks stay RUNNING. `received` holds every
    order. `start_error` is raised by `start`.
    """

    def __init__(
        self,
        script: Script,
        *,
        name: str = "scripted",
        kinds: Collection[Kind] = ("function", "executable", "prompt"),
        start_error: Exception | None = None,
    ) -> None:
        self.name, self.kinds, self.script, self.start_error = name, kinds, script, start_error
        self.received: list[Order] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.closed = False
        self._running: dict[str, asyncio.Task[None]] = {}

    def check(self, spec: TaskSpec) -> None:
        pass

    async def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error

    def submit(self, orders: Sequence[Order], report: Report, read: Reader) -> None:
        self.received.extend(orders)
        for order in orders:
            task = self._running[order.spec.uid] = asyncio.create_task(self._run(order, report, read))
            task.add_done_callback(partial(_report_canceled, order.spec.uid, report))

    async def _run(self, order: Order, report: Report, read: Reader) -> None:
        uid, started = order.spec.uid, time.time()
        report(Running(uid, started))
        try:
            await self.gate.wait()
            values = [read(order.bindings[name]) for name in sorted(order.bindings)]
            answer = self.script(order.spec, values)
            outcome = answer if isinstance(answer, Outcome) else _done(answer, started)
        except Exception as error:  # whatever the script raises is the task's failure
            outcome = _ended(TaskState.FAILED, Cause.ERROR, f"{type(error).__name__}: {error}", started)
        report(Ended(uid, outcome))

    def cancel(self, uids: Collection[str]) -> None:
        for uid in uids:
            if uid in self._running:
                self._running[uid].cancel()

    async def _close(self) -> None:
        self.closed = True
        self.cancel(list(self._running))
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "kinds": sorted(self.kinds)}


def _report_canceled(uid: str, report: Report, task: asyncio.Task[None]) -> None:
    """Also for a task that was canceled before its first step."""
    if task.cancelled():
        report(Ended(uid, _ended(TaskState.CANCELED, Cause.CANCELED, "canceled on request", None)))


def _done(answer: object, started: float) -> Outcome:
    data = msgspec.json.encode(answer)
    value = Value("json", type(answer).__name__, len(data), data)
    return Outcome(state=TaskState.DONE, started=started, ended=time.time(), value=value)


def _ended(state: TaskState, cause: Cause, message: str, started: float | None) -> Outcome:
    return Outcome(state=state, cause=cause, error=message, started=started, ended=time.time())
