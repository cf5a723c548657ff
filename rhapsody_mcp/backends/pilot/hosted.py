"""A backend as the pilot runs it: orders of the service come in, events go out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.backends import BACKENDS
from rhapsody_mcp.backends.base import Backend, Ended, Event, Progressed, Returned, Running
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
    OutputTold,
    PlannedBackend,
    Prioritize,
    Progress,
    Rest,
    Start,
    Submit,
)
from rhapsody_mcp.engine.network.files import SharedCopies, fetch_file
from rhapsody_mcp.engine.network.multiplexer import Multiplexer
from rhapsody_mcp.engine.supervisor import GRACE_S
from rhapsody_mcp.engine.task.node_files import RESULTS, results_folder
from rhapsody_mcp.engine.task.start_log import NOT_STARTED
from rhapsody_mcp.model.errors import BackendUnavailable, RhapsodyError
from rhapsody_mcp.model.outcome import canceled, failed, why_stopped
from rhapsody_mcp.model.specs import Caps, TaskRun
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value, load_json

__all__ = ["HostedBackend"]

_PROGRESS_S = 0.5
_TELL_S = 1.0
"""Seconds between two reports of what tasks have told."""
_PILOT_GONE = "the pilot that ran it is gone: the scheduler ran its job again"


class HostedBackend:
    """`send` delivers a message to the service. `connection` gives the connection with it, once there is one, and
    `is_connected` says whether there is one now.

    `started_before` are the starts, uid and attempt, that an earlier pilot has noted: of the job before, or of this job
    before the scheduler ran it again. Such an attempt does not run a second time.
    """

    def __init__(
        self,
        plan: PlannedBackend,
        send: Callable[[Body], None],
        folder: str,
        connection: Callable[[], Awaitable[Multiplexer]],
        is_connected: Callable[[], bool],
        started_before: Collection[tuple[str, int]] = (),
    ) -> None:
        self._name, self._send, self._folder, self._connection = plan.name, send, folder, connection
        self._started_before, self._is_connected = started_before, is_connected
        caps = {"caps": msgspec.convert(plan.arguments["caps"], Caps)} if "caps" in plan.arguments else {}
        self._backend: Backend = BACKENDS[plan.name].load_class()(**{**plan.arguments, **caps})
        self._backend.work_in(plan.folder)
        self._backend.on_loss = lambda reason: send(BackendLost(self._name, reason))
        self._orders: asyncio.Task[None] | None = None
        self._attempts: dict[str, int] = {}
        """The number of the latest attempt of each task that this pilot has had, by uid."""
        self._live: dict[str, Running | None] = {}
        """The tasks that have not ended, by uid, each with its start."""
        self._none_runs = asyncio.Event()
        self._canceled: set[str] = set()
        self._copying: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()
        self._told: dict[str, Progressed] = {}
        """What running tasks have told last, by uid."""
        self._untold: dict[str, None] = {}
        """The tasks of which the service does not know the last."""
        self._inputs = SharedCopies(self._fetch_input)
        self._unsent: list[tuple[Event, int]] = []
        """Events that are not sent yet, each with the number of its task's attempt."""
        self._end_reason = ""

    @property
    def has_tasks(self) -> bool:
        return bool(self._live)

    # --- orders

    def receive(self, order: Start | Submit | Cancel | Prioritize | AskOutput | Rest) -> None:
        match order:
            case Start():
                self._follow(self._start())
            case Rest():
                self._follow(self._rest())
            case Submit():
                self._submit(order.task_runs)
            case AskOutput():
                self._answering.add(answering := asyncio.create_task(self._tell_output(order)))
                answering.add_done_callback(self._answering.discard)
            case Cancel():
                self._canceled.update(order.uids)
                self._backend.cancel(order.uids)
            case Prioritize():
                self._backend.prioritize(order.priorities)

    async def _tell_output(self, order: AskOutput) -> None:
        parts = await self._backend.read_output(order.uid, order.query)
        self._send(OutputTold(self._name, order.number, parts))

    def _follow(self, coroutine: Coroutine[None, None, None]) -> None:
        """Run the coroutine after the one before."""
        before = self._orders

        async def run() -> None:
            if before is not None:
                await asyncio.wait([before])
            await coroutine

        self._orders = asyncio.create_task(run())

    async def _start(self) -> None:
        reporting = asyncio.create_task(self._report_progress())
        try:
            await self._backend.start()
        except RhapsodyError as error:
            self._send(BackendRefused(self._name, str(error), isinstance(error, BackendUnavailable)))
        except Exception as error:  # a bug of a backend must not leave the service waiting
            self._send(BackendRefused(self._name, repr(error), True))
        else:
            self._send(BackendFacts(self._name, self._backend.describe()))
            self._send(BackendReady(self._name))
        finally:
            reporting.cancel()

    async def _report_progress(self) -> None:
        reported = ""
        while True:
            if (text := self._backend.progress) != reported:
                reported = text
                self._send(Progress(self._name, text))
            await asyncio.sleep(_PROGRESS_S)

    async def _rest(self) -> None:
        await self._backend.rest()
        self._send(BackendRested(self._name))

    # --- tasks

    def _submit(self, task_runs: Sequence[TaskRun]) -> None:
        new = [run for run in task_runs if self._attempts.get(run.spec.uid) != run.attempt]
        for run in new:
            self._attempts[run.spec.uid] = run.attempt
            self._live[run.spec.uid] = None
            self._canceled.discard(run.spec.uid)  # it may run again after a cancellation
        here: list[TaskRun] = []
        elsewhere: list[TaskRun] = []
        for run in new:
            if run.resumed or (run.spec.uid, run.attempt) in self._started_before:
                self._report(Ended(run.spec.uid, failed(Cause.LOST, _PILOT_GONE)))
                continue
            local = replace(run, results_folder=results_folder(run.results_folder, self._folder))
            (elsewhere if local.results_folder != run.results_folder and _has_files(run) else here).append(local)
        if here:
            self._submit_to_backend(here)
        for run in elsewhere:
            self._copying.add(copying := asyncio.create_task(self._submit_with_inputs(run)))
            copying.add_done_callback(self._copying.discard)

    def _submit_to_backend(self, task_runs: Sequence[TaskRun]) -> None:
        try:
            self._backend.submit(task_runs, self._report, load_json)
        except BackendUnavailable as error:
            for run in task_runs:
                self._report(Returned(run.spec.uid, str(error)))

    async def _submit_with_inputs(self, run: TaskRun) -> None:
        """Copy the inputs to this node first."""
        uid = run.spec.uid
        try:
            bindings = {of: await self._local_value(value) for of, value in run.bindings.items()}
        except OSError as error:
            self._report(Ended(uid, failed(Cause.LOST, NOT_STARTED.format(error))))
            return
        if uid in self._canceled:
            self._report(Ended(uid, canceled(Cause.CANCELED, why_stopped(Cause.CANCELED))))
        else:
            self._submit_to_backend([replace(run, bindings=bindings)])

    async def _local_value(self, value: Value) -> Value:
        return value.moved({path: await self._inputs.copy_of(path) for path in value.paths}) if value.paths else value

    async def _fetch_input(self, path: str) -> str:
        """Copy the file to this node; where the connection is lost meanwhile, over the next one."""
        while True:
            connection = await self._connection()
            try:
                return await fetch_file(connection, path, f"{self._folder}/{RESULTS}")
            except OSError:
                if not connection.lost.is_set():
                    raise

    # --- events

    def _report(self, event: Event) -> None:
        if isinstance(event, Progressed):
            self._note_progress(event)
            return
        if isinstance(event, Running):
            self._live[event.uid] = event
        else:
            self._told.pop(event.uid, None)
            started = self._live.pop(event.uid, None)
            if self._end_reason and not any(self._live.values()):
                self._none_runs.set()
            if isinstance(event, Ended) and self._end_reason and event.outcome.cause is Cause.CANCELED:
                event = self._stopped_by_end(event, started)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append((event, self._attempts[event.uid]))
        if isinstance(event, Returned):  # this attempt may come again
            del self._attempts[event.uid]

    def _note_progress(self, event: Progressed) -> None:
        if not self._untold:
            asyncio.get_running_loop().call_later(_TELL_S, self._tell)
        self._told[event.uid] = event
        self._untold[event.uid] = None

    def _tell(self) -> None:
        """Report what is new, unless no service is there, which is told when it comes."""
        uids, self._untold = self._untold, {}
        if self._is_connected():
            self._unsent += [(self._told[uid], self._attempts[uid]) for uid in uids if uid in self._told]
            self._flush()

    def _stopped_by_end(self, event: Ended, started: Running | None) -> Event:
        """The event of a task that ended because the allocation ends, unless somebody had canceled the task."""
        if event.uid in self._canceled:
            return event
        if started is None:
            return Returned(event.uid, self._end_reason)
        outcome = replace(event.outcome, state=TaskState.FAILED, cause=Cause.LOST, error=self._end_reason)
        return Ended(event.uid, outcome)

    def _flush(self) -> None:
        if self._unsent:
            pairs, self._unsent = self._unsent, []
            self._send(Events(self._name, [event for event, _ in pairs], [attempt for _, attempt in pairs]))

    def report_state(self) -> None:
        """Report anew what a service needs that has just taken over: which tasks run, and the facts of the backend."""
        for event in [*self._live.values(), *self._told.values()]:
            if event is not None:
                self._unsent.append((event, self._attempts[event.uid]))
        self._flush()
        self._send(BackendFacts(self._name, self._backend.describe()))

    def drain(self, reason: str) -> None:
        """Start no further task."""
        self._send(Draining(self._name, reason))
        self._backend.drain(reason)

    async def stop_tasks(self, reason: str) -> None:
        """Let running tasks say their last words: programs get SIGTERM. Return when all have ended, or some seconds
        later. Tasks that had started end with cause lost and this reason."""
        self._end_reason = reason
        self._backend.cancel([uid for uid, started in self._live.items() if started is not None])
        self._none_runs.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S + 1):
                if any(self._live.values()):
                    await self._none_runs.wait()

    async def close(self, reason: str) -> None:
        """End the backend. Tasks that had started end with cause lost and this reason, the others are returned."""
        self._end_reason = reason
        if self._orders is not None:
            self._orders.cancel()
            with suppress(asyncio.CancelledError):
                await self._orders
        for copying in self._copying:
            copying.cancel()
        await asyncio.gather(*self._copying, return_exceptions=True)
        await self._inputs.cancel()
        await self._backend.close()
        for uid in list(self._live):  # their inputs were not here yet
            self._report(Returned(uid, reason))
        self._flush()


def _has_files(run: TaskRun) -> bool:
    return any(value.paths for value in run.bindings.values())
