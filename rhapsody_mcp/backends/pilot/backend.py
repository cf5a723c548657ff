"""The proxy of a backend that runs in an allocation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from rhapsody_mcp.backends.base import Backend, BackendBase, Ended, Event, Kind, Progressed, Report, Returned, Running
from rhapsody_mcp.backends.compute.crashes import kept_output, starts_in
from rhapsody_mcp.backends.compute.nodes.result_files import ResultFiles
from rhapsody_mcp.backends.output_reads import OutputReads
from rhapsody_mcp.backends.pilot.allocation import Allocation
from rhapsody_mcp.backends.pilot.messages import (
    AskOutput,
    BackendFacts,
    BackendLost,
    BackendReady,
    BackendRefused,
    BackendRested,
    Body,
    Cancel,
    Draining,
    Events,
    FromPilot,
    OutputTold,
    Prioritize,
    Progress,
    Rest,
    Start,
    Submit,
)
from rhapsody_mcp.backends.shared_run import SharedRun
from rhapsody_mcp.engine.task.output import with_printed
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.live.output import OutputQuery, Printed
from rhapsody_mcp.model.outcome import canceled, failed, why_stopped
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Reader

__all__ = ["PilotBackend"]


_ALL_HERE_S = 1.0
"""How long after the first task of an earlier service all of them are submitted, in seconds."""
_COPY_S = 30.0
"""How long files that are on their way are waited for when another process takes over, in seconds."""
_CLAIM_S = 60.0
"""How long events are kept for tasks that are not submitted yet, in seconds."""


class _Live:
    """A task that has not ended. `is_sent` is whether the pilot was asked to run the task."""

    __slots__ = ("is_canceled", "is_sent", "report", "run", "started")

    def __init__(self, run: TaskRun, report: Report) -> None:
        self.run, self.report = run, report
        self.is_canceled = False
        self.started = self.is_sent = run.resumed


class PilotBackend(BackendBase):
    """Runs the tasks of `local`, a backend that is never started here, in an allocation.

    The start asks for the nodes, and returns when the backend has started there, which may take hours. Where the
    allocation ends, tasks that had started end with cause lost, and the others are returned; the next start asks for
    another allocation.
    """

    abandons_start = True

    def __init__(self, local: Backend, allocation: Allocation) -> None:
        self.name = local.name
        self._local, self._allocation = local, allocation
        self._live: dict[str, _Live] = {}
        self._facts: dict[str, Any] = {}
        self._progress = ""
        self._is_ready = self._is_detached = self._is_draining = False
        self._starting = SharedRun(self._start)
        self._started: asyncio.Future[None] | None = None
        self._rested: asyncio.Future[None] | None = None
        self._output_reads = OutputReads()
        self._files = ResultFiles(allocation.node_of, allocation.reconnected)
        self._sending: asyncio.Task[None] | None = None
        self._unsent: list[_Live] = []
        self._early: dict[tuple[str, int], list[Event]] = {}
        """Events of tasks that an earlier service had, and this one has not submitted yet, by uid and attempt."""
        self._loss = f"backend {self.name!r} is not started."
        allocation.users[self.name] = self

    @property
    def kinds(self) -> Collection[Kind]:
        return self._local.kinds

    @property
    def num_workers(self) -> int | None:  # type: ignore[override]
        return self._facts.get("num_workers", self._local.num_workers)

    @property
    def num_cores(self) -> int | None:  # type: ignore[override]
        return self._facts.get("cores", self._local.num_cores)

    @property
    def progress(self) -> str:
        return (
            self._progress if self._is_ready else "; ".join(filter(None, [self._allocation.progress, self._progress]))
        )

    @property
    def serves_shipped_model(self) -> bool:
        return self._local.serves_shipped_model

    def work_in(self, folder: str) -> None:
        self._local.work_in(folder)

    def keep_in(self, folder: Path) -> None:
        self._allocation.keep_in(folder)

    def detach(self) -> None:
        self._is_detached = self._files.is_closed = True
        self._allocation.hand_over()
        _resolve(self._rested)

    def check(self, spec: TaskSpec) -> None:
        self._local.check(spec)

    def describe(self) -> dict[str, Any]:
        return {**self._local.describe(), **self._facts, **self._allocation.describe()}

    # --- its start and end

    async def start(self) -> None:
        if self._closing is not None:
            raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
        if self._is_ready:
            return
        await self._starting.join()

    async def _start(self) -> None:
        await self._allocation.acquire(self)
        if self._allocation.is_over:
            self._is_ready = True
            return
        self._started = asyncio.get_running_loop().create_future()
        self._allocation.send(Start(self.name))
        await self._started

    async def rest(self) -> None:
        if not self._is_ready or self._allocation.is_over:  # the start has failed, or no task waits for it
            self._is_ready = False
            await self._starting.cancel()
            await self._allocation.leave(self)
            return
        self._is_ready = False
        self._loss = f"backend {self.name!r} is at rest."
        self._rested = asyncio.get_running_loop().create_future()
        self._allocation.send(Rest(self.name))
        await self._rested
        if not self._is_detached:
            await self._allocation.leave(self)

    async def _close(self) -> None:
        self._is_ready = False
        await self._starting.cancel()
        if self._is_detached:
            with suppress(TimeoutError):
                async with asyncio.timeout(_COPY_S):
                    await self._files.finish()
            self._allocation.detach()
        else:
            await self._allocation.leave(self)
        await self._files.finish()
        for live in list(self._live.values()):
            self._end_canceled(live)

    def lose(self, reason: str, unsent: Sequence[Body], *, is_replaced: bool = False) -> None:
        """The pilot is gone, and never got the messages `unsent`; with `is_replaced` another one is there."""
        self._is_ready, self._is_draining, self._loss = False, False, reason or self._loss
        never_sent = {run.spec.uid for body in unsent if isinstance(body, Submit) for run in body.task_runs}
        noted, is_complete = set[tuple[str, int]](), self._allocation.notes_are_complete
        try:
            noted = starts_in({live.run.results_folder for live in self._live.values()})
        except OSError:
            is_complete = False
        sent = {uid for uid, live in self._live.items() if live.is_sent} - never_sent
        unnoted = set[str]() if is_complete else sent
        if is_replaced:
            self._begin_again()
        else:
            self._fail_waiting(reason)
        lost: list[_Live] = []
        for uid, live in list(self._live.items()):
            if live.is_canceled:
                self._end_canceled(live)
            elif live.started or (uid, live.run.attempt) in noted or uid in unnoted:
                lost.append(live)
            else:
                self._end(live, Returned(uid, reason))
        for live, printed in zip(lost, kept_output(live.run for live in lost), strict=True):
            self._end(live, Ended(live.run.spec.uid, with_printed(failed(Cause.LOST, reason), printed)))

    def _fail_waiting(self, reason: str) -> None:
        for waiting in (self._started, self._rested):
            if waiting is not None and not waiting.done():
                waiting.set_exception(BackendUnavailable(reason))
                waiting.exception()

    def _begin_again(self) -> None:
        """Ask the new pilot for what the one before was about to do."""
        _resolve(self._rested)
        if self._started is not None and not self._started.done():
            self._allocation.send(Start(self.name))

    # --- tasks

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if not self._is_ready:
            raise BackendUnavailable(self._loss)
        reports = {
            folder: self._files.report_with(report, folder) for folder in {run.results_folder for run in task_runs}
        }
        self._allocation.result_folders.update(reports)
        for run in task_runs:
            early = self._early.pop((run.spec.uid, run.attempt), ())
            if any(isinstance(event, Running) for event in early):
                run = replace(run, resumed=True)
            live = self._live[run.spec.uid] = _Live(run, reports[run.results_folder])
            for event in early:
                if not isinstance(event, Returned):  # a task that is here is not returned yet
                    self._receive_event(event, run.attempt)
            if self._live.get(run.spec.uid) is live:
                self._unsent.append(live)
        if self._sending is None:
            self._sending = asyncio.create_task(self._return_unsent() if self._allocation.is_over else self._send())

    async def _return_unsent(self) -> None:
        """Once all tasks of an allocation that is over are here: end those that had started, return the others."""
        await asyncio.sleep(_ALL_HERE_S)
        self._sending, self._unsent = None, []
        for live in self._live.values():  # the earlier service may have sent it
            live.is_sent = True
        self.lose(self._loss, ())

    async def _send(self) -> None:
        """Send tasks that wait, once it is on the disk that they may start."""
        while self._unsent:
            batch = sorted(self._unsent, key=lambda live: -live.run.spec.priority)
            self._unsent = []
            uids = [live.run.spec.uid for live in batch]
            if self.before_start is not None and not await self.before_start(uids):
                break
            if not self._is_ready:
                break
            runs = [live.run for live in batch if self._live.get(live.run.spec.uid) is live and self._can_run(live)]
            for run in runs:
                self._live[run.spec.uid].is_sent = True
            if runs:
                self._allocation.send(Submit(self.name, runs))
        self._sending = None
        self._end_if_only_waiting()

    def _can_run(self, live: _Live) -> bool:
        """Whether this allocation can run the task; else the task waits for the next one. A task that had started
        before this service is sent in any case: the pilot knows what became of it."""
        timeout_s = live.run.spec.timeout_s
        has_time = timeout_s is None or self._allocation.has_time_for(timeout_s)
        return live.started or (has_time and not self._is_draining)

    def _end_if_only_waiting(self) -> None:
        """End the allocation where it can run none of the tasks that are left."""
        if self._live and not self._unsent and self.is_waiting:
            self._allocation.end_if_unused()

    @property
    def is_waiting(self) -> bool:
        """Whether no task of this backend runs in the allocation, or is about to."""
        return not self._starting.goes_on and not any(live.is_sent for live in self._live.values())

    def cancel(self, uids: Collection[str]) -> None:
        if self._is_detached:  # the tasks go on there
            return
        sent = []
        for uid in uids:
            if (live := self._live.get(uid)) is None:
                continue
            live.is_canceled = True
            if live.is_sent:
                sent.append(uid)
            else:
                self._end_canceled(live)
        if sent and self._is_ready:
            self._allocation.send(Cancel(self.name, sent))

    async def read_output(self, uid: str, query: OutputQuery) -> Printed | None:
        live, allocation = self._live.get(uid), self._allocation
        if live is None or not live.started or not self._is_ready or not allocation.is_connected:
            return None
        return await self._output_reads.ask(lambda number: allocation.send(AskOutput(self.name, number, uid, query)))

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        sent = {}
        for uid in priorities.keys() & self._live.keys():
            live = self._live[uid]
            live.run = replace(live.run, spec=replace(live.run.spec, priority=priorities[uid]))
            if live.is_sent and not live.started:
                sent[uid] = priorities[uid]
        if sent and self._is_ready:
            self._allocation.send(Prioritize(self.name, sent))

    def _end_canceled(self, live: _Live) -> None:
        self._end(live, Ended(live.run.spec.uid, canceled(Cause.CANCELED, why_stopped(Cause.CANCELED))))

    def _end(self, live: _Live, event: Event) -> None:
        del self._live[live.run.spec.uid]
        live.report(event)

    # --- what the pilot says

    def receive(self, message: FromPilot) -> Awaitable[None] | None:
        match message:
            case Events():
                for event, attempt in zip(message.events, message.attempts, strict=True):
                    self._receive_event(event, attempt)
                self._end_if_only_waiting()
                return self._recorded(message)
            case BackendReady():
                if self._started is not None and not self._started.done():  # the start may have been given up
                    self._is_ready, self._progress = True, "ready"
                    self._started.set_result(None)
            case BackendRefused():
                self._refuse(message)
            case BackendRested():
                _resolve(self._rested)
            case BackendLost():
                self.on_loss(message.reason)
            case Draining():
                self._is_draining = True
                self.on_loss(message.reason)
            case Progress():
                self._progress = message.text
            case OutputTold():
                self._output_reads.answer(message.number, message.parts)
            case BackendFacts():
                self._facts = message.facts
        return None

    def _refuse(self, message: BackendRefused) -> None:
        error = BackendUnavailable(message.reason) if message.again else InvalidSettings(message.reason)
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)

    def _receive_event(self, event: Event, attempt: int) -> None:
        live = self._live.get(event.uid)
        if live is None or live.run.attempt != attempt:
            self._early.setdefault((event.uid, attempt), []).append(event)
            return
        if isinstance(event, Running | Progressed):
            live.started = True
            live.report(event)
        elif isinstance(event, Returned) and self._is_draining:
            live.is_sent = False  # the task waits for the next allocation
        else:
            self._end(live, event)

    async def _recorded(self, message: Events) -> None:
        """Return when what was reported is on the disk. Events whose tasks this service does not have yet get time."""
        keys = set[tuple[str, int]]()
        if self._early:
            pairs = zip(message.events, message.attempts, strict=True)
            keys = {(event.uid, attempt) for event, attempt in pairs} & self._early.keys()
        if keys:
            await self._until_claimed()
            for key in keys:
                self._early.pop(key, None)
        await self._files.finish()
        if self.before_start is not None:
            await self.before_start([])

    async def _until_claimed(self) -> None:
        """Return when this service has had the time to submit what an earlier one had: it does so once the start of the
        backend is over."""
        was_starting = True
        while was_starting and self._closing is None:
            was_starting = self._starting.goes_on
            await asyncio.sleep(_CLAIM_S)
            was_starting |= self._starting.goes_on


def _resolve(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
