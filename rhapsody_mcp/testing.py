"""A scripted backend: runs functions in this process, in memory, for tests of what is built on a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from inspect import isawaitable
from typing import Any

import msgspec

from rhapsody_mcp.backends.base import BackendBase, Ended, Event, Kind, Report, Returned, Running
from rhapsody_mcp.model.errors import BackendUnavailable
from rhapsody_mcp.model.outcome import Outcome, why_stopped
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader, Value

__all__ = ["ScriptedBackend"]

Script = Callable[[TaskSpec, list[Any]], Any]


class ScriptedBackend(BackendBase):
    """Answers each task with what `script(spec, values)` returns; what it raises makes the task FAILED.

    A script that returns an Outcome gives the whole of what came of the task; an async one is awaited. `values` are
    the results that the task refers to, in the order of their uids. While `door` is clear, tasks do not start; while
    `gate` is clear, they stay RUNNING. `received` holds every task run. `start_error` is raised by `start`. `die` ends
    the engine; `starts` and `rests` count how often it was started, and stopped to rest.
    """

    progress: str = ""

    def __init__(
        self,
        script: Script,
        *,
        name: str = "scripted",
        kinds: Collection[Kind] = ("function", "executable", "prompt"),
        start_error: Exception | None = None,
    ) -> None:
        self.name, self.kinds, self.script, self.start_error = name, kinds, script, start_error
        self.received: list[TaskRun] = []
        self.gate, self.door = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.door.set()
        self.starts = self.rests = 0
        self._dead = ""
        self._last: dict[str, Event] = {}
        self.closed = False
        self._running: dict[str, asyncio.Task[None]] = {}
        self._began: dict[str, float] = {}

    async def start(self) -> None:
        if self.closed:
            raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
        if self.start_error is not None:
            raise self.start_error
        self.starts += 1
        self._dead = ""

    async def rest(self) -> None:
        self.rests += 1

    def die(self, reason: str) -> None:
        """Lose what has started, give the rest back, and take nothing until the next start."""
        self._dead = reason
        for uid, task in self._running.items():
            lost = Ended(uid, _ended(TaskState.FAILED, Cause.LOST, reason, self._began.get(uid)))
            self._last[uid] = lost if uid in self._began else Returned(uid, reason)
            task.cancel()

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if self._dead:
            raise BackendUnavailable(self._dead)
        self.received.extend(task_runs)
        for task_run in task_runs:
            task = self._running[task_run.spec.uid] = asyncio.create_task(self._run(task_run, report, read))
            task.add_done_callback(partial(self._over, task_run.spec.uid, report))

    def _over(self, uid: str, report: Report, task: asyncio.Task[None]) -> None:
        """Also for a task that was canceled before its first step."""
        if self._running.get(uid) is task:  # and not the next attempt
            del self._running[uid]
            self._began.pop(uid, None)
        canceled = Ended(uid, _ended(TaskState.CANCELED, Cause.CANCELED, why_stopped(Cause.CANCELED), None))
        last = self._last.pop(uid, canceled)
        if task.cancelled():
            report(last)

    async def _run(self, task_run: TaskRun, report: Report, read: Reader) -> None:
        await self.door.wait()
        uid = task_run.spec.uid
        started = self._began[uid] = time.time()
        report(Running(uid, started))
        try:
            await self.gate.wait()
            values = [read(task_run.bindings[name]) for name in sorted(task_run.bindings)]
            answer = self.script(task_run.spec, values)
            if isawaitable(answer):
                answer = await answer
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


def _done(answer: object, started: float) -> Outcome:
    data = msgspec.json.encode(answer)
    value = Value("json", type(answer).__name__, len(data), data)
    return Outcome(state=TaskState.DONE, started=started, ended=time.time(), value=value)


def _ended(state: TaskState, cause: Cause, message: str, started: float | None) -> Outcome:
    return Outcome(state=state, cause=cause, error=message, started=started, ended=time.time())
