"""The allocation of a session: requested when a backend needs it, and released when none does."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from rhapsody_mcp.backends.compute.nodes.keys import new_key
from rhapsody_mcp.backends.pilot.allocation_facts import AllocationFacts, allocation_text, make_facts, used_up_text
from rhapsody_mcp.backends.pilot.allocation_user import AllocationUser
from rhapsody_mcp.backends.pilot.delivery import Delivery
from rhapsody_mcp.backends.pilot.job_script import job_script, why_ended
from rhapsody_mcp.backends.pilot.messages import (
    Body,
    Events,
    FromPilot,
    PilotConfig,
    PilotReady,
    PlannedBackend,
    Release,
)
from rhapsody_mcp.backends.pilot.node_time import AllocationHistory, node_time
from rhapsody_mcp.backends.pilot.private_files import write_private
from rhapsody_mcp.backends.pilot.saved_events import SavedEvents
from rhapsody_mcp.backends.pilot.submission import PATIENCE_S, AllocationRecord, Submission
from rhapsody_mcp.backends.shared_run import SharedRun
from rhapsody_mcp.engine.network import tls
from rhapsody_mcp.engine.network.addresses import reachable_addresses
from rhapsody_mcp.engine.network.files import FileServer
from rhapsody_mcp.engine.network.multiplexer import Multiplexer, Stream
from rhapsody_mcp.model.errors import AllocationsUsedUp, BackendUnavailable, SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus, Scheduler

__all__ = ["Allocation"]

_ADDRESS = "service.json"
_LOG = "pilot.log"
_APART = "pilot.apart"
"""A file of the session's folder that says that its pilot, which has tasks, does not see the folder."""
_POLL_S = (1.0, 15.0)
"""The seconds between two questions to the scheduler: at first, and in the end."""
_CONNECTED_POLL_S = 120.0
"""The same while the pilot speaks."""
_RELEASE_S = 30.0
_SILENT_S = 15.0
"""How long a pilot has to be silent before its node may count as dead, in seconds: it dials again every 5 s."""
_DRAIN_S, _DRAIN_SHARE = 120.0, 0.1
"""No task is started in the last two minutes of an allocation, in the last tenth of a short one."""
_MAX_FAILURES = 3


def _done() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


class Allocation:
    """One allocation at a time; a new one is requested after the end of the one before."""

    def __init__(
        self,
        request: AllocationRequest,
        scheduler: Scheduler,
        backends: Sequence[PlannedBackend],
        *,
        setup: Sequence[str] = (),
        python: str = sys.executable,
        orphan_s: float = 600.0,
        allocations: int = 1,
    ) -> None:
        """`allocations` is how many may be requested one after the other; see `NodeTime.counts`. What they may use
        together, nodes times minutes times `allocations`, bounds the time of each job."""
        self.request, self._scheduler, self._planned = request, scheduler, list(backends)
        self._minutes = request.minutes
        self._setup, self._python, self._orphan_s = setup, python, orphan_s
        self._submission = Submission(scheduler)
        self.folder = Path()
        self.users: dict[str, AllocationUser] = {}
        self.status: JobStatus | None = None
        """What the scheduler last said of the job; None while there is no job."""
        self.job = ""
        self.pilot: PilotReady | None = None
        self._needed_by: set[str] = set()
        self._pem = ""
        self._server: asyncio.Server | None = None
        self._delivery: Delivery[FromPilot] | None = None
        self._multiplexer: Multiplexer | None = None
        self._unsettled: list[tuple[int, asyncio.Future[None]]] = []
        self._watch: asyncio.Task[None] | None = None
        self._keeping_alive: asyncio.Task[None] | None = None
        self._starting, self._releasing = SharedRun(self._start), SharedRun(self._release)
        self._ready = asyncio.Event()
        self._failures, self._is_given_back = 0, False
        self._allocations, self._history = allocations, AllocationHistory()
        self._port, self._last_loss, self._end_cause = 0, "", ""
        self._saved = SavedEvents(may_delete=lambda: not self._is_handed_over)
        self._is_handed_over = False
        self._silent_since: float | None = None
        self.result_folders: set[str] = set()

    @property
    def progress(self) -> str:
        """The state of the allocation, in words; empty where there is none."""
        return allocation_text(self.facts) if self.job else self._submission.problem or self._last_loss

    @property
    def notes_are_complete(self) -> bool:
        """Whether the nodes note each start of a task in the folder of the session."""
        return self.pilot.sees_folder if self.pilot is not None else not (self.folder / _APART).exists()

    def describe(self) -> dict[str, Any]:
        """Facts about the allocation, as plain data."""
        shared = {} if self.pilot is None else {"shared folder": self.pilot.sees_folder}
        return {"allocation": msgspec.to_builtins(self.facts), **shared}

    @property
    def facts(self) -> AllocationFacts:
        ended = self._history.jobs(self.folder)
        left = self._minutes_left
        return make_facts(self.request, self._allocations, ended, self.job, self.status, self.pilot, left)

    @property
    def _minutes_left(self) -> int:
        """The minutes of the next job; 0 where there can be none."""
        return self._history.minutes_left(self.folder, self.request.nodes, self._minutes, self._allocations)

    @property
    def drain_s(self) -> float:
        """How long before its end the allocation starts no further task, in seconds."""
        return min(_DRAIN_S, _DRAIN_SHARE * 60 * self.request.minutes)

    def has_time_for(self, seconds: float) -> bool:
        """Whether a task that may take so long, in seconds, ends before the allocation does; True also for a task that
        may take longer than a whole allocation, because no other has more time for it."""
        is_longer = seconds > 60 * self.request.minutes - self.drain_s
        return is_longer or self.pilot is None or time.time() + seconds < self.pilot.ends - self.drain_s / 2

    def keep_in(self, folder: Path) -> None:
        """Keep in this folder what another service needs to go on."""
        self.folder = folder
        self._history.jobs(folder)  # read now: the folder may be deleted before the last question

    # --- requests of the backends

    async def acquire(self, user: AllocationUser) -> None:
        """Return when a pilot is there, or when `is_over`. Raises BackendUnavailable where the job ends before."""
        await self._releasing.until_none()
        self._needed_by.add(user.name)
        await self._starting.join()

    @property
    def is_over(self) -> bool:
        """Whether the job that an earlier service had requested was over when this one looked for it."""
        return not self.job

    @property
    def is_connected(self) -> bool:
        return self._delivery is not None and self._delivery.is_connected

    def send(self, body: Body) -> None:
        """Send an order to the pilot, now or on the next connection."""
        assert self._delivery is not None, "the allocation was acquired"
        self._delivery.send(body)

    async def leave(self, user: AllocationUser) -> None:
        """The backend needs the allocation no longer; with the last one the nodes are given back."""
        self._needed_by.discard(user.name)
        if not self._needed_by:
            await self.release()

    async def release(self) -> None:
        """End the job and give its nodes back; return when the scheduler has them. A start waits for that."""
        await self._releasing.join()

    async def _release(self) -> None:
        await self._starting.cancel()
        if not self.job:
            with suppress(BackendUnavailable):
                await self._find_again(_RELEASE_S)
        if not self.job:  # a job that was taken all the same finds nobody, and ends by itself
            self._close_connection()
            return
        self._is_given_back = True
        if self.is_connected:
            self.send(Release())
            if self._watch is not None:
                await asyncio.wait({self._watch}, timeout=_RELEASE_S)
        if not self.job:
            return
        await self._submission.cancel(self.job)
        self._tell_users("its nodes were given back")
        self._forget()

    def end_if_unused(self) -> None:
        """Give the nodes back where all tasks that are left wait for the next allocation."""
        if self._delivery is not None and all(user.is_waiting for user in self.users.values()):
            self._delivery.send(Release())

    def hand_over(self) -> None:
        """Take no message of the pilot any more: what it reports from now on is for the process that takes over."""
        self._is_handed_over = True

    def detach(self) -> None:
        """Leave the pilot alone: another process will take the session over."""
        self._close_connection()

    # --- its start

    async def _start(self) -> None:
        if self._ready.is_set():
            return
        if not self.job:
            await self._find_again()
        if self._saved.take(self.folder, self._receive_saved) and not self.job:
            self._tell_users("the service ended at the same time as the allocation")
            return
        is_resumed = bool(self.job)
        await self._listen()
        if not is_resumed:
            await self._request()
        self._watch = ended = self._watch or asyncio.create_task(self._watch_job(self.job))
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self._ready.is_set() and not is_resumed:
            raise BackendUnavailable(self._last_loss)

    async def _request(self) -> None:
        if self._failures >= _MAX_FAILURES:
            raise BackendUnavailable(
                f"{self._failures} allocations in a row ended before anything ran; the last: {self._last_loss}. No "
                "other is requested; close this session and open another."
            )
        if (minutes := self._minutes_left) < 1:
            why = f" The last job ended: {self._last_loss}." if self._last_loss else ""
            raise AllocationsUsedUp(used_up_text(self._allocations, self._minutes) + why)
        self.request = msgspec.structs.replace(self.request, minutes=minutes)
        record = AllocationRecord(self._pem, self._port)
        self.job = await self._submission.submit(self.request, self._script(), self.folder / _LOG, record, self.folder)
        self._last_loss = ""

    def _script(self) -> str:
        config = PilotConfig(
            addresses=reachable_addresses(),
            port=self._port,
            address_file=str(self.folder / _ADDRESS),
            pem=self._pem,
            backends=self._planned,
            folder=str(self.folder),
            sys_path=[entry or os.getcwd() for entry in sys.path],
            orphan_s=self._orphan_s,
            minutes=self.request.minutes,
            drain_s=self.drain_s,
        )
        return job_script(config, self._setup, self._python)

    async def _find_again(self, within_s: float = PATIENCE_S) -> None:
        """Find the job that an earlier service has requested. Raises BackendUnavailable."""
        if self.folder != Path() and (record := await self._submission.find_again(self.folder, within_s)) is not None:
            self.job, self._pem, self._port = record.job, record.pem, record.port
            self.request = msgspec.structs.replace(self.request, minutes=record.minutes or self._minutes)

    # --- the connection

    async def _listen(self) -> None:
        if self._server is not None:
            return
        if self.folder == Path():
            base = platformdirs.user_state_path("rhapsody-mcp") / "allocations"
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(dir=base))
        self._pem = self._pem or new_key()
        self._delivery = Delivery(self._receive, on_new_life=self._on_new_pilot)
        self._keeping_alive = asyncio.create_task(self._delivery.keep_alive())
        loop, context = asyncio.get_running_loop(), tls.context(self._pem, server=True)
        for port in dict.fromkeys([self._port, 0]):  # the port of the service before, where it is free
            with suppress(OSError):
                self._server = await loop.create_server(self._accept, "0.0.0.0", port, ssl=context)
                break
        assert self._server is not None, "a free port was asked for"
        self._port = self._server.sockets[0].getsockname()[1]
        write_private(self.folder / _ADDRESS, msgspec.json.encode((reachable_addresses(), self._port)))

    def _accept(self) -> Multiplexer:
        multiplexer = Multiplexer(
            is_server=True,
            open_stream=self._serve_file,
            on_first_data=lambda: self._on_connected(multiplexer),
        )
        return multiplexer

    def _on_connected(self, multiplexer: Multiplexer) -> None:
        if self._delivery is not None:
            self._multiplexer = multiplexer
            self._delivery.connect(multiplexer)

    def _serve_file(self, stream: Stream, kind: bytes) -> None:
        FileServer(stream, lambda path: os.path.dirname(os.path.realpath(path)) in self.result_folders)

    def node_of(self, path: str) -> Multiplexer | None:
        """The connection with the pilot where this file lies in the pilot's own folder; None for another file."""
        is_there = self.pilot is not None and path.startswith(f"{self.pilot.folder}/")
        return self._multiplexer if is_there else None

    async def reconnected(self, lost: Multiplexer) -> bool:
        """Wait until the pilot is connected again after the loss of this connection; False where the job is over."""
        while self._multiplexer is lost and self._delivery is not None and self._watch is not None:
            waiting = asyncio.create_task(self._delivery.connected.wait())
            await asyncio.wait([waiting, self._watch], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        return self._multiplexer is not None

    def _receive(self, message: FromPilot, number: int) -> None:
        if self._is_handed_over:
            return
        if isinstance(message, PilotReady):
            self.pilot = message
            self._submission.note_pilot(self.folder)
            with suppress(OSError):
                if message.sees_folder:
                    (self.folder / _APART).unlink(missing_ok=True)
                else:
                    (self.folder / _APART).touch()
            self._ready.set()
            done: Awaitable[None] | None = None
        else:
            user = self.users.get(message.backend)
            done = user.receive(message) if user is not None else None
        future = asyncio.ensure_future(done) if done is not None else _done()
        self._unsettled.append((number, future))
        future.add_done_callback(lambda _: self._settle())

    def _settle(self) -> None:
        """Acknowledge the messages up to the first whose events are not on the disk."""
        last = 0
        while not self._is_handed_over and self._unsettled and self._unsettled[0][1].done():
            last = self._unsettled.pop(0)[0]
        if last and self._delivery is not None:
            self._delivery.settle(last)

    def _close_connection(self) -> None:
        self._ready.clear()
        for task in filter(None, (self._watch, self._keeping_alive)):
            task.cancel()
        if self._server is not None:
            self._server.close()
        if self._multiplexer is not None:
            self._multiplexer.control.user = None  # what still comes is of no use
            self._multiplexer.close()
        self._server = self._watch = self._multiplexer = None

    # --- the job

    async def _watch_job(self, job: str) -> None:
        """Ask the scheduler about the job, often while it is pending or its pilot is silent; return when it is over."""
        delay_s = _POLL_S[0]
        while True:
            with suppress(SchedulerUnavailable, SchedulerRefusal):
                self.status = (await self._scheduler.status([job]))[job]
                if self.status.state in (JobState.ENDED, JobState.UNKNOWN):
                    break
                if self.status.state is JobState.RUNNING:
                    await self._end_without_pilot()
            if self._multiplexer is not None and self._is_speaking:
                await self._until_lost(self._multiplexer)
                delay_s = _POLL_S[0]
            else:
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 1.5, _POLL_S[1])
        self._lose(self._end_cause + why_ended(self.job, self.status, self.folder / _LOG, self._ready.is_set()))

    async def _end_without_pilot(self) -> None:
        """End the job where its pilot's node is dead: a job that goes on without a node would keep the others."""
        now = asyncio.get_running_loop().time()
        if self._is_speaking:
            self._silent_since = None
            return
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since > _SILENT_S and (node := await self._scheduler.dead_script_node(self.job)):
            self._end_cause = f"its pilot was on node {node}, which is down; "
            await self._scheduler.cancel(self.job)

    async def _until_lost(self, connection: Multiplexer) -> None:
        """Return when the connection is lost, or after a while."""
        with suppress(TimeoutError):
            await asyncio.wait_for(connection.lost.wait(), _CONNECTED_POLL_S)

    @property
    def _is_speaking(self) -> bool:
        """Whether the pilot has reported, and its connection holds."""
        return self._ready.is_set() and self._delivery is not None and self._delivery.is_connected

    def _lose(self, reason: str) -> None:
        """The job is over: tell the backends, after what the pilot has left for them."""
        self._failures = 0 if self._ready.is_set() else self._failures + 1
        self._last_loss = reason
        self._saved.take(self.folder, self._receive_saved)
        self._tell_users(reason)
        self._forget()

    def _tell_users(self, reason: str) -> None:
        unsent = self._delivery.unwritten if self._delivery is not None else []
        for user in list(self.users.values()):
            user.lose(reason, unsent)

    def _on_new_pilot(self) -> None:
        """The scheduler has run the job again: what the pilot before had is gone, but for what it has left."""
        assert self._delivery is not None, "a pilot says hello through it"
        self._saved.take(self.folder, self._receive_saved)
        unsent, self._unsettled = self._delivery.unwritten, []
        self._delivery.drop_unacknowledged()
        for user in list(self.users.values()):
            user.lose(f"job {self.job} of the allocation was run again by the scheduler", unsent, is_replaced=True)

    def _receive_saved(self, events: Events) -> Awaitable[None] | None:
        return user.receive(events) if (user := self.users.get(events.backend)) is not None else None

    def _forget(self) -> None:
        """Forget the job, which is over, or ends by itself: its key opens nothing any more."""
        self._close_connection()
        self._pem, self._port = "", 0
        had_pilot = self._submission.had_pilot
        used = node_time(self.job, self.request, self.status, self.pilot, had_pilot=had_pilot)
        counts = had_pilot and not self._is_given_back
        self._history.add(self.folder, used and msgspec.structs.replace(used, counts=counts))
        self._is_given_back = False
        self.job, self.pilot, self.status, self._delivery, self._end_cause = "", None, None, None, ""
        self._silent_since = None
        self._needed_by.clear()
        self._unsettled = []
        self._submission.forget(self.folder)
