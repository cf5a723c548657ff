"""A backend of a session: started on demand, restarted when its engine dies, stopped when idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from rhapsody_mcp.backends.base import RESTARTS, Backend, Ended, Event, Progressed, Running, restart_delay_s
from rhapsody_mcp.model.errors import BackendError, BackendUnavailable, RhapsodyError
from rhapsody_mcp.model.outcome import failed
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Reader
from rhapsody_mcp.runtime.session.steps import TASKS_PER_STEP

__all__ = ["CallLater", "EngineNotice", "ManagedBackend", "call_later"]

_log = logging.getLogger(__name__)
_ABANDON_S = 10.0
"""How long after the withdrawal of its last task a start is given up: corrected tasks may follow."""
_CAUSES_WITHOUT_ENGINE = (Cause.LOST, Cause.CANCELED, Cause.INVALID)
"""The causes with which a task may end although no engine works."""


class EngineNotice(NamedTuple):
    """A sentence about an engine of a session, and its time in seconds since the epoch."""

    at: float
    text: str


class _Timer(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], object]], _Timer]


def call_later(delay_s: float, call: Callable[[], object]) -> _Timer:
    """Call a function after a delay, by the timer of the running event loop."""
    return asyncio.get_running_loop().call_later(delay_s, call)


class ManagedBackend:
    """Accepts task runs at any time, and keeps them pending until the backend has started.

    An engine that dies is restarted 1, 2, 4, 8 and 16 s later while tasks are pending. After five restarts in a row
    without a finished task, the pending tasks end FAILED with cause lost, and the next task begins a new series. A
    failed first start is not repeated. With `idle_s`, an engine without a task for this many seconds is stopped until
    the next task, unless `is_needed` returns True.
    """

    def __init__(
        self,
        backend: Backend,
        report: Callable[[Running | Progressed | Ended], None],
        read: Reader,
        *,
        notify: Callable[[EngineNotice], None] = lambda _: None,
        is_needed: Callable[[], bool] = lambda: False,
        idle_s: float | None = None,
        call_later: CallLater = call_later,
    ) -> None:
        self.backend = backend
        self._report, self._read, self._call_later = report, read, call_later
        self._notify, self._is_needed, self._idle_s = notify, is_needed, idle_s
        self._ready = self._closed = self._backing_off = False
        self._pending: list[TaskRun] = []
        self._live: dict[str, TaskRun] = {}
        self._failures = 0
        self._last_failure = self._activity = self._last_loss = ""
        backend.on_loss = self._report_loss
        self._start_task: asyncio.Task[None] | None = None
        self._rest_task: asyncio.Task[None] | None = None
        self._idle_timer: _Timer | None = None

    @property
    def progress(self) -> str:
        """What the engine does now, for users; empty where the backend reports nothing."""
        state = "" if self._backing_off else self.backend.progress
        return "; ".join(filter(None, [self._activity, state]))

    # --- requests of the session

    def submit(self, task_runs: Collection[TaskRun]) -> None:
        """Run the task runs. Exactly one Ended is reported for each, whatever happens to the engine."""
        self._cancel_idle_timer()
        if self._ready and not self._pending:
            try:
                self._submit_to_backend(task_runs)
                return
            except BackendUnavailable as error:
                self._mark_dead(str(error))
        self._pending.extend(task_runs)
        self._sort_pending()
        self._begin_start()

    def withdraw(self, uids: Collection[str]) -> set[str]:
        """Remove pending task runs, and return their uids. Nothing is reported for these tasks."""
        held = {task_run.spec.uid for task_run in self._pending if task_run.spec.uid in uids}
        self._pending = [task_run for task_run in self._pending if task_run.spec.uid not in held]
        if held and self.backend.abandons_start:
            self._call_later(_ABANDON_S, self._abandon_start)
        return held

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        """Give waiting tasks, by uid, these priorities."""
        for number, task_run in enumerate(self._pending):
            if (priority := priorities.get(task_run.spec.uid)) is not None:
                self._pending[number] = replace(task_run, spec=replace(task_run.spec, priority=priority))
        self._sort_pending()
        submitted = {uid: priority for uid, priority in priorities.items() if uid in self._live}
        for uid, priority in submitted.items():  # one that its engine gives back keeps its priority
            task_run = self._live[uid]
            self._live[uid] = replace(task_run, spec=replace(task_run.spec, priority=priority))
        self.backend.prioritize(submitted)

    def _sort_pending(self) -> None:
        if any(task_run.spec.priority for task_run in self._pending):
            self._pending.sort(key=lambda task_run: -task_run.spec.priority)

    def cancel(self, uids: Iterable[str]) -> None:
        """Ask the backend to cancel the submitted tasks among these."""
        if submitted := [uid for uid in uids if uid in self._live]:
            self.backend.cancel(submitted)

    async def close(self) -> None:
        """Stop the backend. Nothing is reported for pending task runs."""
        self._closed = True
        self._cancel_idle_timer()
        if self._start_task is not None:
            self._start_task.cancel()
            await asyncio.wait({self._start_task})
        if self._rest_task is not None:
            await asyncio.wait({self._rest_task})
        await self.backend.close()

    # --- submitting to the backend

    def _submit_to_backend(self, task_runs: Collection[TaskRun]) -> None:
        by_uid = {task_run.spec.uid: task_run for task_run in task_runs}
        self._live |= by_uid
        try:
            self.backend.submit(list(task_runs), self._handle_event, self._read)
        except BaseException:
            for uid in by_uid:
                self._live.pop(uid, None)
            raise

    def _handle_event(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._live.pop(event.uid, None)
            if event.outcome.cause not in _CAUSES_WITHOUT_ENGINE:
                self._failures = 0
            self._report(event)
            if not self._live:
                self._set_idle_timer()
        elif isinstance(event, Running | Progressed):
            self._report(event)
        else:
            self._requeue(self._live.pop(event.uid), event.reason)

    def _requeue(self, task_run: TaskRun, reason: str) -> None:
        self._mark_dead(reason)
        if not self._closed:
            self._pending.append(task_run)
            self._begin_start()

    def _mark_dead(self, reason: str) -> None:
        """Count the end of the engine, once."""
        if self._ready:
            self._ready = False
            self._count_failure(reason)

    def _count_failure(self, reason: str) -> None:
        self._failures, self._last_failure = self._failures + 1, reason
        self._report_loss(reason)
        self._last_loss = ""

    def _report_loss(self, reason: str) -> None:
        """Post a notice of a loss once, although the backend, its tasks and the next submission may each report it."""
        if reason != self._last_loss:
            self._post_notice(f"backend {self.backend.name!r} lost its engine: {reason}")
        self._last_loss = reason

    def _post_notice(self, text: str) -> None:
        self._notify(EngineNotice(time.time(), text))

    # --- starting

    def _begin_start(self) -> None:
        if self._start_task is None and not self._closed:
            self._start_task = asyncio.create_task(self._start())

    async def _start(self) -> None:
        """Submit the pending task runs, or end them where the backend does not start."""
        try:
            while self._pending:
                if self._ready:
                    self._submit_pending()
                    await asyncio.sleep(0)
                else:
                    await self._wait_for_rest()
                    await self._try_start()
        except RhapsodyError as error:
            cause = Cause.LOST if isinstance(error, BackendError) else Cause.INVALID
            self._fail_pending(cause, f"backend {self.backend.name!r} did not start: {error}")
        except Exception as error:  # a bug of a backend must not leave tasks waiting forever
            _log.exception("backend %r did not start", self.backend.name)
            self._fail_pending(Cause.LOST, f"backend {self.backend.name!r} failed to start: {error!r}")
        finally:
            self._start_task, self._activity = None, ""
            self._continue()

    def _continue(self) -> None:
        if self._pending and not self._closed:  # task runs that ended may have queued others
            self._begin_start()
        self._set_idle_timer()

    def _abandon_start(self) -> None:
        """Give up a start that no task waits for any more."""
        if self._start_task is not None and not self._pending and not self._is_needed():
            self._start_task.cancel()
            self._give_back()

    async def _try_start(self) -> None:
        if failures := self._failures:
            await self._back_off()
            if not self._pending:
                return
        try:
            await self.backend.start()
        except BackendUnavailable as error:
            if not failures:
                raise
            self._count_failure(str(error))
        else:
            self._ready = True
            self._sort_pending()
            self._submit_pending()
            if failures and self._ready:
                self._post_notice(f"backend {self.backend.name!r} runs again, at attempt {failures} of {RESTARTS}")

    def _submit_pending(self) -> None:
        task_runs, self._pending = self._pending[:TASKS_PER_STEP], self._pending[TASKS_PER_STEP:]
        try:
            self._submit_to_backend(task_runs)
        except BaseException as error:
            self._pending = [*task_runs, *self._pending]
            self._mark_dead(str(error))
            if not isinstance(error, BackendUnavailable):
                raise

    async def _back_off(self) -> None:
        if self._failures > RESTARTS:
            raise BackendUnavailable(
                f"its engine was started again {RESTARTS} times and ended each time before a task did; "
                f"the last time: {self._last_failure}"
            )
        self._activity = f"starting again ({self._failures} of {RESTARTS}) after: {self._last_failure}"
        self._backing_off = True
        delay_over = asyncio.Event()
        timer = self._call_later(restart_delay_s(self._failures), delay_over.set)
        try:
            await delay_over.wait()
        finally:
            self._backing_off = False
            timer.cancel()

    def _fail_pending(self, cause: Cause, message: str) -> None:
        task_runs, self._pending = self._pending, []
        self._failures = 0
        self._post_notice(message)
        for task_run in task_runs:
            self._report(Ended(task_run.spec.uid, failed(cause, message)))
        if not self._closed:
            self._give_back()

    # --- resting

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _set_idle_timer(self) -> None:
        self._cancel_idle_timer()
        if self._idle_s is not None and self._ready and not self._live and not self._closed:
            self._idle_timer = self._call_later(self._idle_s, self._rest)

    def _rest(self) -> None:
        self._idle_timer = None
        if self._is_needed():
            self._set_idle_timer()
            return
        self._ready = False
        self._rest_task = asyncio.create_task(self.backend.rest())
        self._rest_task.add_done_callback(self._handle_rested)

    def _give_back(self) -> None:
        """Give back what a start that failed or was canceled still holds, such as nodes."""
        self._rest_task = asyncio.create_task(self.backend.rest())
        self._rest_task.add_done_callback(self._forget_rest)

    def _forget_rest(self, rest: asyncio.Task[None]) -> None:
        self._rest_task = None
        if not rest.cancelled() and (error := rest.exception()) is not None:
            _log.error("backend %r did not stop to rest", self.backend.name, exc_info=error)

    def _handle_rested(self, rest: asyncio.Task[None]) -> None:
        self._forget_rest(rest)
        self._post_notice(
            f"backend {self.backend.name!r} had no task for {self._idle_s:g} s and was stopped until the next one"
        )

    async def _wait_for_rest(self) -> None:
        if self._rest_task is not None:
            await asyncio.wait({self._rest_task})
