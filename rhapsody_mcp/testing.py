"""A backend for tests of code that uses a session: it answers tasks with a function in this process."""

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
    """Answers each task with the return value of `script(spec, values)`; a task whose script raises ends FAILED.

    The script may be async, and may return a whole Outcome. `values` are the results that the task refers to, in the
    order of their uids. While the event `may_start` is clear, tasks do not start; while `may_finish` is clear, started
    tasks stay RUNNING. `received` holds every task run. `start` raises `start_error`, if given. `starts` and `rests`
    count the calls of `start` and `rest`.
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
        self.may_finish, self.may_start = asyncio.Event(), asyncio.Event()
        self.may_finish.set()
        self.may_start.set()
        self.starts = self.rests = 0
        self._dead = ""
        self._last_events: dict[str, Event] = {}
        self.closed = False
        self._running: dict[str, asyncio.Task[None]] = {}
        self._started_at: dict[str, float] = {}

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
        """Simulate the loss of the engine: started tasks end with cause lost, the others are returned, and `submit`
        raises BackendUnavailable until the next start."""
        self._dead = reason
        for uid, task in self._running.items():
            lost = Ended(uid, _ended(TaskState.FAILED, Cause.LOST, reason, self._started_at.get(uid)))
            self._last_events[uid] = lost if uid in self._started_at else Returned(uid, reason)
            task.cancel()

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if self._dead:
            raise BackendUnavailable(self._dead)
        self.received.extend(task_runs)
        for task_run in task_runs:
            task = self._running[task_run.spec.uid] = asyncio.create_task(self._run(task_run, report, read))
            task.add_done_callback(partial(self._on_end, task_run.spec.uid, report))

    def _on_end(self, uid: str, report: Report, task: asyncio.Task[None]) -> None:
        """Forget the task, and report its end where it was canceled, also before its first step."""
        if self._running.get(uid) is task:  # not where the next attempt has begun
            del self._running[uid]
            self._started_at.pop(uid, None)
        canceled = Ended(uid, _ended(TaskState.CANCELED, Cause.CANCELED, why_stopped(Cause.CANCELED), None))
        last = self._last_events.pop(uid, canceled)
        if task.cancelled():
            report(last)

    async def _run(self, task_run: TaskRun, report: Report, read: Reader) -> None:
        await self.may_start.wait()
        uid = task_run.spec.uid
        started = self._started_at[uid] = time.time()
        report(Running(uid, started))
        try:
            await self.may_finish.wait()
            values = [read(task_run.bindings[name]) for name in sorted(task_run.bindings)]
            answer = self.script(task_run.spec, values)
            if isawaitable(answer):
                answer = await answer
            outcome = answer if isinstance(answer, Outcome) else _done(answer, started)
        except Exception as error:  # each error of the script is a failure of the task
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
