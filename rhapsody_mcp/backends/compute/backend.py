"""Runs functions and programs in processes that a host places: what the Dragon and the local backend share."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from rhapsody_mcp.backends.base import Awaitable, BeforeStart, EngineBook, Kind, Report, Returned, Running
from rhapsody_mcp.backends.base import Ended as EndedEvent
from rhapsody_mcp.backends.engine_process import Keeper
from rhapsody_mcp.backends.environment import Environment, read_environment
from rhapsody_mcp.engine.messages import (
    Ask,
    Cancel,
    Ended,
    Failed,
    Finished,
    Gone,
    HostConfig,
    Interrupt,
    Listening,
    Ping,
    Place,
    Pong,
    Ready,
    Revoked,
    Run,
    Started,
    Stop,
    ToBackend,
    Up,
)
from rhapsody_mcp.engine.node.launchers import count_cores
from rhapsody_mcp.engine.process.liveness import LOOKS, Stalls, is_stopped
from rhapsody_mcp.engine.process.run_dirs import Folder
from rhapsody_mcp.engine.process.tree import ENGINE, end, marked
from rhapsody_mcp.engine.supervisor import GRACE_S
from rhapsody_mcp.engine.task.output import left_out, move_stream, stopped_note
from rhapsody_mcp.engine.task.output_files import MOVES, STREAMS
from rhapsody_mcp.engine.task.rank_result import how_it_ended
from rhapsody_mcp.engine.task.start_log import starts_in
from rhapsody_mcp.engine.transport import Frames, frame
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest, InvalidSettings, InvalidTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Caps, Order, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader, Stream

__all__ = ["ComputeBackend", "path_of_tasks"]

_AT_ONCE = 250
_GAVE_UP = "leftover files in /dev/shm"
"""Dragon's launcher says it last of all; rarely, it stays after that."""
_SHM_FILE = re.compile(r"DD\w+|\w*\d[DM]|warning: \d+ leftover files in /dev/shm: ?")
_LOOK_S = 1.0
_RANKS_A_CORE = 32
_QUICK_S = 0.005  # a worker whose functions are quicker is sent several at once
_MOST_SENT = 64
_TOLD_AHEAD = 512  # one write into a ledger for so many starts,
_TOLD_S = 1.0  # which begin soon: later, a ledger may not be written any more
_SOON_S = 0.005
_CHUNK = 1 << 18
_NOTHING = Stream()
_MOST_SENT_BYTES = 1024 * 1024  # more waits in the service's memory twice until the worker has read it
_CLOSING_S = 15.0  # the keeper's own grace, and then some
_LOST_S = 1.5
_HEARING_S = 2.0


class ComputeBackend(Awaitable):
    """Runs up to `num_workers` native functions at a time, and up to as many tasks in processes of their own.

    A job counts for as many as it has ranks; one with more ranks than `num_workers` runs alone. What a worker
    is given it runs one after the other; when it dies, only the task that was running fails. A worker, or an engine,
    that has been stopped for `stall_s`, or an engine that has not answered for so long, counts as dead.
    """

    placer: Literal["dragon", "local"]
    dispatch: Literal["workers", "batch"] = "workers"
    """With batch, a worker is started for a bundle of functions and ends with it."""
    kinds: Collection[Kind] = ("function", "executable")
    start_limits_s: tuple[float, float] = (60.0, 120.0)
    """How long a start may take, and a second one where the first failed: rarely, one of a few seconds hangs."""
    book: EngineBook | None = None
    before_start: BeforeStart | None = None
    instead: str = ""
    """What else runs the same tasks."""

    def __init__(
        self,
        num_workers: int | None,
        name: str,
        stall_s: float,
        environment: Mapping[str, Any] | Environment | None = None,
        caps: Caps | None = None,
    ) -> None:
        self._cores = count_cores()
        most = _RANKS_A_CORE * self._cores
        if num_workers is not None and (not isinstance(num_workers, int) or not 1 <= num_workers <= most):
            raise InvalidSettings(f"num_workers is {num_workers!r}; valid is a whole number from 1 to {most}.")
        self.name, self.stall_s = name, stall_s
        self.cwd = ""
        self.environment, self.caps = read_environment(environment), caps or Caps()
        self.num_workers = num_workers or self._cores
        self.progress = "not started"
        self._starting: asyncio.Task[None] | None = None
        self._engine: _Engine | None = None

    def check(self, spec: TaskSpec) -> None:
        """Refuses more ranks than this node can hold at once: each is two processes."""
        if spec.layout.ranks > (most := _RANKS_A_CORE * self._cores):
            raise InvalidTask(
                f"{spec.layout.ranks} ranks are too many for this machine of {self._cores} cores; "
                f"valid is up to {most} ({_RANKS_A_CORE} a core)."
            )

    def _refuse_to_start(self) -> None:
        """Raise where this machine cannot run the engine."""

    def _host_command(self, config: Path) -> list[str]:
        """The command that runs the host program."""
        return [sys.executable, "-m", "rhapsody_mcp.engine.host", str(config)]

    def _host_environment(self, folder: Path, environment: dict[str, str]) -> dict[str, str]:
        """The environment of the host program, made of that of the tasks; `folder` is the engine's own."""
        return {**environment, "PATH": path_of_tasks(environment)}

    def work_in(self, folder: str) -> None:
        """Have tasks start in this folder, in the place of that of this process.

        Raises InvalidRequest where they start elsewhere already.
        """
        if self._engine is not None and folder != self.cwd:
            raise InvalidRequest(
                f"backend {self.name!r} has started, and its tasks start in {self.cwd or os.getcwd()}; "
                "give work_dir with a backend that has not been awaited."
            )
        self.cwd = folder

    async def start(self) -> None:
        if self._closing is not None:
            raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
        if self._engine is not None and self._engine.lost is None:
            return
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        await asyncio.shield(self._starting)

    def _started(self, _: asyncio.Task[None]) -> None:
        self._starting = None

    async def _start(self) -> None:
        self._refuse_to_start()
        self.progress = "starting"
        if self._engine is not None:
            await self._engine.ended()
        first_s, second_s = self.start_limits_s
        try:
            try:
                self._engine = await self._new_engine(first_s)
            except BackendUnavailable as error:
                late = isinstance(error.__cause__, TimeoutError)
                self.progress = (
                    f"starting again, the first start {f'took more than {first_s:.0f} s' if late else 'failed'}"
                )
                self._engine = await self._new_engine(second_s)
        except BaseException:
            self.progress = "did not start"
            raise
        self.progress = "ready"

    async def _new_engine(self, limit_s: float) -> _Engine:
        engine = _Engine(self)
        try:
            await engine.start(limit_s)
        except BackendUnavailable as error:
            await engine.close()
            again = "Try again: tasks that are submitted again, under the same names, start the engine anew"
            raise BackendUnavailable(f"{str(error).rstrip('.')}. {again}{self.instead}.") from error.__cause__
        except BaseException:
            await engine.close()
            raise
        return engine

    def submit(self, orders: Sequence[Order], report: Report, read: Reader) -> None:
        if self._engine is None or self._engine.lost is not None:
            raise BackendUnavailable((self._engine and self._engine.lost) or f"backend {self.name!r} is not started.")
        self._engine.submit(orders, report)

    def cancel(self, uids: Collection[str]) -> None:
        if self._engine is not None:
            self._engine.stop_tasks(uids, Cause.CANCELED)

    async def rest(self) -> None:
        if self._engine is not None and self._engine.lost is None:
            self.progress = "at rest; the next task starts it"
            await self._engine.close()

    async def _close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()
        self.progress = "closed"

    def describe(self) -> dict[str, Any]:
        ready = self._engine.ready if self._engine else None
        node = {"host": ready.host, "cores": ready.cores, "gpus": ready.gpus} if ready else {}
        return {"backend": self.name, "runs on": self.placer, "num_workers": self.num_workers, **node}


def path_of_tasks(environment: Mapping[str, str]) -> str:
    """The user's own, and last the folder of this Python: `python3` is the same program whatever runs the task."""
    folders = [*environment.get("PATH", os.defpath).split(os.pathsep), str(Path(sys.executable).parent)]
    return os.pathsep.join(dict.fromkeys(folders))


def _taken_out(queue: deque[_Live]) -> list[_Live]:
    """What is to be stopped, in order; it is not in the queue any more."""
    stopped = [live for live in queue if live.stop is not None]
    if stopped:
        kept = [live for live in queue if live.stop is None]
        queue.clear()
        queue.extend(kept)
    return stopped


class _Live:
    """A task that has not ended."""

    __slots__ = ("asked", "known", "native", "order", "report", "started", "stop", "timer", "told", "uid", "worker")

    def __init__(self, order: Order, report: Report) -> None:
        self.order, self.report = order, report
        self.uid = order.spec.uid
        self.native = order.spec.layout.mode == "native"
        self.worker: _Worker | None = None
        self.asked = False
        """Whether the host, or its worker, has been asked to run it."""
        self.known: asyncio.Future[bool] | None = None
        """Whether `before_start` has said that it may start; it was asked at the time `told`."""
        self.told = 0.0
        self.started: float | None = None
        self.stop: Cause | None = None
        self.timer: asyncio.TimerHandle | None = None

    def is_untold(self, now: float) -> bool:
        """Or told so long ago that much may be otherwise."""
        return self.known is None or (now - self.told > _TOLD_S and self.known.done())

    @property
    def size(self) -> int:
        """Bytes of what is sent of it."""
        work = self.order.spec.work
        return len(work.code) + len(work.arguments) if isinstance(work, Call) else 0

    def has_started(self, starts: Collection[tuple[str, int]]) -> bool:
        """By what was heard of it, or by the notes."""
        return self.started is not None or (self.uid, self.order.attempt) in starts

    @property
    def slots(self) -> int:
        return max(1, self.order.spec.layout.ranks)


class _Worker:
    """A worker process as the backend sees it; `sent` are its tasks, the running one first."""

    def __init__(self, name: str, window: int) -> None:
        self.name = name
        self.tasks: _Peer | None = None
        self.control: _Peer | None = None
        self.sent: dict[str, _Live] = {}
        self.recalled: set[str] = set()
        self.begun: _Live | None = None
        """The last one that has started, until that is told."""
        self.window = window
        self.gone: Gone | None = None


class _Engine:
    """One life of the engine: from its keeper's start to its end."""

    def __init__(self, backend: ComputeBackend) -> None:
        self.backend = backend
        self._bundles = backend.dispatch == "batch"
        self.lost: str | None = None
        self.ready: Ready | None = None
        self._mark = secrets.token_hex(8)
        self._folder = Folder()
        self._log = self._folder.path / "engine.log"
        self._keeper: Keeper | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None
        self._unanswered = 0
        self._server: asyncio.Server | None = None
        self._peers: set[_Peer] = set()
        self._host: _Peer | None = None
        self._host_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._worker_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._workers_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._all_heard = asyncio.Event()
        self._all_heard.set()
        self._live: dict[str, _Live] = {}
        self._tells_soon = False
        self._queue: deque[_Live] = deque()
        self._process_queue: deque[_Live] = deque()
        self._workers: dict[str, _Worker] = {}
        self._burials: set[asyncio.Task[None]] = set()
        self._worker_count = 0
        self._used_slots = 0

    # --- life

    async def start(self, limit_s: float) -> None:
        """Returns when the host and a worker can take tasks; the other workers come soon after."""
        loop = asyncio.get_running_loop()
        address = str(self._folder.path / "backend")
        self._server = await loop.create_unix_server(lambda: _Peer(self), address)
        self._keeper = await self._start_keeper(address)
        self._watches.append(asyncio.create_task(self._watch_keeper(self._keeper)))
        giving_up = asyncio.create_task(self._watch_log())
        try:
            async with asyncio.timeout(limit_s):
                await self._host_ready
                self._watches.append(asyncio.create_task(self._watch_pulse(self._keeper.pid)))
                if not self._bundles:
                    for _ in range(self.backend.num_workers):
                        self._place_worker()
                    await self._worker_up
                    self._watches.append(asyncio.create_task(self._watch_others(limit_s)))
        except TimeoutError as error:
            message = f"the engine of backend {self.backend.name!r} was not ready in {limit_s:.0f} s"
            raise BackendUnavailable(message + self._last_words()) from error
        finally:
            giving_up.cancel()

    async def _watch_others(self, limit_s: float) -> None:
        """Notice that the start of a further worker hangs: every start after it would wait for it."""
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wait([self._workers_up])
        except TimeoutError:
            self.lose(f"a worker of backend {self.backend.name!r} was not ready in {limit_s:.0f} s{self._last_words()}")

    async def _watch_log(self) -> None:
        """Notice a launcher that gave up and does not end."""
        while _GAVE_UP not in self._read_log():  # noqa: ASYNC110 - a file's growth is no event
            await asyncio.sleep(_LOOK_S)
        self.lose(f"the engine of backend {self.backend.name!r} gave up its start{self._last_words()}")

    async def _start_keeper(self, address: str) -> Keeper:
        config = self._folder.path / "host.json"
        sys_path = [entry or os.getcwd() for entry in sys.path]
        host = HostConfig(
            placer=self.backend.placer,
            mark=self._mark,
            address=address,
            folder=str(self._folder.path),
            sys_path=sys_path,
            cwd=self.backend.cwd or os.getcwd(),
            batch=self._bundles,
            stall_s=self.backend.stall_s,
            caps=self.backend.caps,
        )
        config.write_bytes(msgspec.json.encode(host))
        keeper = Keeper(self._mark, self.backend.placer, self._folder.path, self.backend.book)
        await keeper.start(
            ["--name", self.backend.name, "--log", str(self._log), "--stop", "close"],
            self.backend._host_command(config),
            self.backend._host_environment(self._folder.path, await self.backend.environment.build()),
        )
        return keeper

    async def _watch_keeper(self, keeper: Keeper) -> None:
        code = await keeper.wait()
        self.lose(f"the engine of backend {self.backend.name!r} ended with exit code {code}{self._last_words()}")

    def _last_words(self) -> str:
        lines = [line for line in self._read_log().splitlines() if line.strip() and not _SHM_FILE.fullmatch(line)]
        return ": " + " | ".join(lines[-5:])[-1000:] if lines else ""

    def _read_log(self) -> str:
        try:
            return self._log.read_text(errors="replace")
        except OSError:
            return ""

    async def _watch_pulse(self, keeper: int) -> None:
        """Notice an engine that somebody has stopped, and a host that does not answer.

        Unanswered questions are counted, and not seconds: whoever was asleep with the whole machine has missed none.
        """
        stalls, stall_s = Stalls(), self.backend.stall_s
        while self._host is not None:
            if self._unanswered >= LOOKS or stalls.look([keeper]):
                what = "keeper was stopped" if self._unanswered < LOOKS else "host did not answer"
                self.lose(f"the engine of backend {self.backend.name!r} stood still: its {what} for {stall_s:g} s", 0)
                return
            self._unanswered += 1
            self._host.send(Ping())
            await asyncio.sleep(stall_s / (LOOKS - 1))

    def lose(self, message: str, patience_s: float = _LOST_S) -> None:
        """The engine is gone, or has to go: what it ran is lost, and the rest is given back once none of it is left.

        After `patience_s` it is killed.
        """
        if self.lost is None:
            self.backend.progress = "ended; the next task starts it anew"
            self._stop(message, patience_s)

    def _stop(self, message: str, patience_s: float) -> None:
        if self.lost is not None:
            return
        self.lost = message
        for step in (self._host_ready, self._worker_up, self._workers_up):
            if not step.done():
                step.set_exception(BackendUnavailable(message))
                step.exception()  # nobody may be waiting any more
        self._ending = asyncio.create_task(self._end(patience_s))

    async def _end(self, patience_s: float) -> None:
        if self._keeper is not None:
            await self._end_keeper(self._keeper, patience_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEARING_S):
                await self._all_heard.wait()
        await asyncio.gather(*self._burials)
        starts = await asyncio.to_thread(_starts, {live.order.folder for live in self._live.values()})
        for live in list(self._live.values()):
            self._give_up(live, starts)
        for watch in self._watches:
            watch.cancel()
        if self._server is not None:
            self._server.close()
        for peer in list(self._peers):
            peer.transport.abort()
        self._folder.remove()

    async def _end_keeper(self, keeper: Keeper, patience_s: float) -> None:
        """Let the keeper end what it keeps; where that takes too long, end it from here."""
        keeper.release()
        if not await _ends(keeper, patience_s):
            await asyncio.to_thread(end, lambda: marked(ENGINE, self._mark))
            if is_stopped(keeper.pid) or not await _ends(keeper, _CLOSING_S):
                keeper.kill()
        await keeper.wait()

    def _give_up(self, live: _Live, starts: Collection[tuple[str, int]]) -> None:
        """Nothing of the engine runs any more, and all that it said is heard."""
        assert self.lost is not None
        if live.stop is not None:
            self._finish(live, _stopped(live))
        elif live.has_started(starts):
            self._finish(live, _failed(Cause.LOST, self.lost, live.started))
        else:
            del self._live[live.uid]
            live.report(Returned(live.uid, self.lost))

    async def ended(self) -> None:
        """Wait until nothing of it is left, where it is lost."""
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def close(self) -> None:
        """End every process, then every task."""
        for live in self._live.values():
            live.stop = live.stop or Cause.CANCELED
        self._stop(f"backend {self.backend.name!r} was closed", _CLOSING_S)
        await self.ended()

    # --- what the session asks for

    def submit(self, orders: Iterable[Order], report: Report) -> None:
        for order in orders:
            live = _Live(order, report)
            self._live[live.uid] = live
            (self._queue if live.native else self._process_queue).append(live)
        self._pump()

    def stop_tasks(self, uids: Iterable[str], cause: Cause) -> None:
        """Ask for tasks to end, because they are canceled or their time is up."""
        stopping = [live for uid in uids if (live := self._live.get(uid)) is not None and live.stop is None]
        for live in stopping:
            live.stop = cause
        waiting = [live for queue in (self._queue, self._process_queue) for live in _taken_out(queue)]
        self._finish_stopped(waiting)
        stopped = {live.uid for live in stopping} - {live.uid for live in waiting}
        for worker in dict.fromkeys(live.worker for live in stopping if live.worker is not None):
            for live in reversed([live for live in worker.sent.values() if live.uid in stopped]):
                if live.asked:
                    self._interrupt(
                        live, worker
                    )  # the one that runs comes last: none of the others starts in its place
                else:
                    del worker.sent[live.uid]
                    self._finish(live, _stopped(live))
        for live in stopping:
            if live.uid in stopped and live.worker is None and live.asked and self._host is not None:
                self._host.send(Cancel(live.uid))

    def _finish_stopped(self, waiting: list[_Live]) -> None:
        """Of many, the first now: others are served in between."""
        for live in waiting[:_AT_ONCE]:
            self._finish(live, _stopped(live))
        if rest := waiting[_AT_ONCE:]:
            asyncio.get_running_loop().call_soon(self._finish_stopped, rest)

    def _interrupt(self, live: _Live, worker: _Worker) -> None:
        """First an exception inside the function; where that does not help, its worker is replaced."""
        if worker.control is not None:
            worker.control.send(Interrupt(live.uid))
        asyncio.get_running_loop().call_later(GRACE_S, self._replace, live, worker)

    def _replace(self, live: _Live, worker: _Worker) -> None:
        if live.uid in worker.sent and self._host is not None:
            self._host.send(Stop(worker.name))

    # --- dispatch

    def _pump(self) -> None:
        """Give workers and the host what they have room for."""
        if self.lost is not None:
            return
        if self._bundles:
            self._start_bundles()
        for worker in self._workers.values():
            if self._queue and worker.tasks is not None and worker.gone is None:
                self._feed(worker)
        while self._process_queue and self._host is not None:
            live = self._process_queue[0]
            slots = min(live.slots, self.backend.num_workers)
            if self._used_slots + slots > self.backend.num_workers:
                break
            self._process_queue.popleft()
            self._used_slots += slots
            self._once_known([live], self._process_queue, partial(self._ask, live))

    def _once_known(self, lives: Sequence[_Live], queue: deque[_Live], ask: Callable[[], None]) -> None:
        """Have these started once whoever wants to know of it does, who is told of the next in the queue as well."""
        if self.backend.before_start is None:
            ask()
            return
        now, ahead = asyncio.get_running_loop().time(), _TOLD_AHEAD // 2
        if any(live.is_untold(now) for live in lives) or (len(queue) > ahead and queue[ahead].is_untold(now)):
            near = itertools.islice(queue, _TOLD_AHEAD)
            untold = [live for live in itertools.chain(lives, near) if live.is_untold(now)]
            known = asyncio.ensure_future(self.backend.before_start([live.uid for live in untold]))
            for live in untold:
                live.known, live.told = known, now
        told = {live.known for live in lives if live.known is not None}
        if all(known.done() for known in told):
            if all(known.result() for known in told):
                ask()
        else:
            asyncio.gather(*told).add_done_callback(lambda told: ask() if all(told.result()) else None)

    def _ask(self, live: _Live) -> None:
        if live.uid not in self._live or self._host is None:
            return
        if live.stop is not None:
            self._free_slots(live)
            self._finish(live, _stopped(live))
            self._pump()
            return
        live.asked = True
        self._host.send(Ask(live.order))

    def _free_slots(self, live: _Live) -> None:
        self._used_slots -= min(live.slots, self.backend.num_workers)

    def _start_bundles(self) -> None:
        """Have a worker placed for each bundle that waits; it gets its bundle when it is up."""
        bundles = -(-len(self._queue) // _MOST_SENT)
        coming = sum(not worker.sent for worker in self._workers.values())
        for _ in range(min(bundles - coming, self.backend.num_workers - len(self._workers))):
            self._place_worker()

    def _feed(self, worker: _Worker) -> None:
        fair = -(-len(self._queue) // max(1, len(self._workers)))
        room = max(0, min(worker.window, max(1, fair)) - len(worker.sent))
        share: list[_Live] = []
        size = 0
        while self._queue and len(share) < room and size < _MOST_SENT_BYTES:
            live = self._queue.popleft()
            size += live.size
            share.append(live)
            live.worker = worker
            worker.sent[live.uid] = live
        if share:
            self._once_known(share, self._queue, partial(self._send, worker, share))

    def _send(self, worker: _Worker, share: Iterable[_Live]) -> None:
        """What is still this worker's."""
        if worker.tasks is None:
            return
        runs: list[object] = []
        for live in share:
            work = live.order.spec.work
            assert isinstance(work, Call)
            if worker.sent.get(live.uid) is live:
                live.asked = True
                runs.append(Run(live.uid, work, live.order.bindings, live.order.folder, live.order.attempt))
        if runs:
            worker.tasks.send(*runs)
        else:  # all were canceled meanwhile
            self._pump()

    def _steal(self) -> None:
        """Where a worker has nothing to do, take back what another has been sent and not begun."""
        if self._queue or not any(not worker.sent and worker.tasks for worker in self._workers.values()):
            return
        for worker in self._workers.values():
            if len(worker.sent) > 1 and worker.control is not None and not worker.recalled:
                worker.recalled = {live.uid for live in list(worker.sent.values())[1:] if live.asked}
                worker.control.send(*(Interrupt(uid, running=False) for uid in worker.recalled))

    # --- what the engine says

    def hear(self, peer: _Peer, message: ToBackend) -> None:
        match message:
            case Finished():
                self._on_finished(peer, message)
            case Started():
                self._on_started(message.uid, message.at)
            case Revoked():
                self._on_revoked(message.uid)
            case Up():
                peer.worker = self._workers.get(message.worker)
                if peer.worker is not None:
                    peer.worker.tasks = peer
                    self._all_heard.clear()
                    self._on_up()
            case Listening():
                if message.worker in self._workers:
                    self._workers[message.worker].control = peer
            case Ended():
                self._on_ended(message)
            case Gone():
                worker = self._workers[message.worker]
                worker.gone = message
                self._bury(worker)
            case Failed():
                self._on_failed(message)
            case Pong():
                self._unanswered = 0
            case Ready():
                self._host, self.ready = peer, message
                if not self._host_ready.done():
                    self._host_ready.set_result(None)

    def disconnected(self, peer: _Peer) -> None:
        self._peers.discard(peer)
        if peer.worker is not None and peer.worker.tasks is peer:
            peer.worker.tasks = None
            self._bury(peer.worker)
        if not any(other.worker is not None for other in self._peers):
            self._all_heard.set()
        if peer is self._host:  # what placed it may stay without it
            self._host = None
            self.lose(f"the engine of backend {self.backend.name!r} lost its host{self._last_words()}")

    def _on_up(self) -> None:
        if not self._worker_up.done():
            self._worker_up.set_result(None)
        self._count_up()
        self._pump()
        if not self._bundles:
            self._steal()

    def _count_up(self) -> None:
        if not self._workers_up.done() and all(worker.tasks is not None for worker in self._workers.values()):
            self._workers_up.set_result(None)

    def _on_started(self, uid: str, at: float) -> None:
        live = self._live.get(uid)
        if live is None:
            return
        live.started = at
        if live.worker is None:
            self._tell_start(live)
            return
        live.worker.recalled.discard(uid)  # too late to take it back
        live.worker.begun = live
        if not self._tells_soon:
            self._tells_soon = True
            asyncio.get_running_loop().call_later(_SOON_S, self._tell_begun)

    def _tell_begun(self) -> None:
        """Tell of the functions that run now. What ends soon nobody could see run, and to tell of it takes long."""
        self._tells_soon = False
        for worker in self._workers.values():
            begun, worker.begun = worker.begun, None
            if begun is not None and begun.uid in worker.sent:
                self._tell_start(begun)

    def _tell_start(self, live: _Live) -> None:
        assert live.started is not None
        if live.native and live.order.spec.timeout_s is not None:
            loop, left_s = asyncio.get_running_loop(), live.order.spec.timeout_s - (time.time() - live.started)
            live.timer = loop.call_later(max(0.0, left_s), self.stop_tasks, [live.uid], Cause.TIMEOUT)
        live.report(Running(live.uid, live.started))

    def _on_finished(self, peer: _Peer, message: Finished) -> None:
        worker, live = peer.worker, self._live.get(message.uid)
        assert worker is not None
        worker.sent.pop(message.uid, None)
        if live is not None:
            self._finish(live, _outcome(live, message))
        if self._bundles:
            self._on_bundle(worker)
            return
        quick = message.ended - message.started < _QUICK_S
        worker.window = min(worker.window * 2, _MOST_SENT) if quick else 1
        worker.recalled.discard(message.uid)
        if self._queue:
            if len(worker.sent) <= worker.window // 2:
                self._feed(worker)
        elif not worker.sent:
            self._steal()

    def _on_bundle(self, worker: _Worker) -> None:
        """Let a worker whose bundle is done go; the end of its connection tells it."""
        if not worker.sent and worker.tasks is not None:
            worker.tasks.transport.close()

    def _on_revoked(self, uid: str) -> None:
        live = self._live.get(uid)
        if live is None or live.worker is None:
            return
        live.worker.sent.pop(uid, None)
        live.worker.recalled.discard(uid)
        live.worker, live.asked = None, False
        if live.stop is not None:
            self._finish(live, _stopped(live))
        else:
            self._queue.appendleft(live)
            self._pump()

    def _on_ended(self, message: Ended) -> None:
        live = self._live.get(message.uid)
        if live is None:
            return
        self._free_slots(live)
        self._finish(live, message.outcome)
        self._pump()

    def _on_failed(self, message: Failed) -> None:
        del self._workers[message.worker]
        if not self._workers:
            self.lose(f"backend {self.backend.name!r} could not place a worker: {message.error}")
        else:
            self._count_up()

    def _bury(self, worker: _Worker) -> None:
        """Once a worker is gone and all that it said is heard: fail what it ran, give the rest to others."""
        if worker.gone is None or worker.tasks is not None or worker.name not in self._workers:
            return
        del self._workers[worker.name]
        burial = asyncio.create_task(self._settle(list(worker.sent.values()), worker.gone))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)
        if self.lost is None and not self._bundles:
            self._place_worker()
        self._pump()

    async def _settle(self, rest: Sequence[_Live], gone: Gone) -> None:
        """`rest` is what a worker that is gone had been sent and had not ended."""
        folders = {live.order.folder for live in rest if live.asked}
        for live in rest:
            live.worker, live.asked = None, False
        starts = await asyncio.to_thread(_starts, folders)
        for live in rest:
            if live.has_started(starts) or live.stop is not None:
                printed = await asyncio.to_thread(_printed, gone.printed, live.order.folder, self.backend.caps)
                self._finish(live, _stopped(live, *printed) if live.stop else _crashed(live, gone, printed))
        self._queue.extendleft(live for live in reversed(rest) if live.uid in self._live)
        self._pump()
        await asyncio.to_thread(_remove_printed, gone.printed)

    def _place_worker(self) -> None:
        self._worker_count += 1
        worker = _Worker(str(self._worker_count), _MOST_SENT if self._bundles else 1)
        self._workers[worker.name] = worker
        if self._host is not None:
            self._host.send(Place(worker.name))

    def _finish(self, live: _Live, outcome: Outcome) -> None:
        if self._live.pop(live.uid, None) is not None:
            if live.timer is not None:
                live.timer.cancel()
            live.report(EndedEvent(live.uid, outcome))


class _Peer(asyncio.Protocol):
    """A connection from the host or from a worker."""

    transport: asyncio.Transport

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._frames: Frames[ToBackend] = Frames(ToBackend)
        self.worker: _Worker | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio
        self._engine._peers.add(self)

    def data_received(self, data: bytes) -> None:
        messages = list(self._frames.feed(data))
        ended = {message.uid for message in messages if type(message) is Finished}
        for message in messages:
            if not (type(message) is Started and message.uid in ended):  # nobody could see it run
                self._engine.hear(self, message)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._hear_rest()
        self._engine.disconnected(self)

    def _hear_rest(self) -> None:
        """A write to a process that has died ends the connection; what it had said before is still there."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        with suppress(OSError):  # there is no more
            while data := os.read(descriptor, _CHUNK):
                self.data_received(data)

    def send(self, *messages: object) -> None:
        self.transport.write(frame(list(messages)))


async def _ends(keeper: Keeper, within_s: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await keeper.wait()
            return True
    return False


def _starts(folders: Iterable[str]) -> set[tuple[str, int]]:
    return {start for folder in folders for start in starts_in(folder)}


def _printed(path: str, folder: str, caps: Caps) -> tuple[Stream, Stream]:
    """What a worker that is gone left in its files; nothing where they are gone, as for the second to ask."""
    return _left_in(f"{path}.{STREAMS[0]}", folder, caps), _left_in(f"{path}.{STREAMS[1]}", folder, caps)


def _remove_printed(path: str) -> None:
    for suffix in (*STREAMS, MOVES):
        Path(f"{path}.{suffix}").unlink(missing_ok=True)


def _left_in(path: str, folder: str, caps: Caps) -> Stream:
    try:
        return move_stream(path, folder, caps.output_bytes)
    except OSError:
        return Stream()


def _outcome(live: _Live, message: Finished) -> Outcome:
    result = message.result
    if message.interrupted and live.stop is not None:
        return _stopped(live, message.stdout, message.stderr, message.started)
    state = TaskState.DONE if result.cause is None else TaskState.FAILED
    return Outcome(
        state=state,
        started=None if result.cause is Cause.INVALID else message.started,
        ended=message.ended,
        value=result.value,
        stdout=message.stdout,
        stderr=message.stderr,
        cause=result.cause,
        error=result.error,
        traceback=result.traceback,
        exception=result.exception,
        notes=(*left_out(message), *([stopped_note(message.left_running)] if message.left_running else ())),
    )


def _stopped(
    live: _Live, stdout: Stream = _NOTHING, stderr: Stream = _NOTHING, started: float | None = None
) -> Outcome:
    """The outcome of a task that was canceled, or whose time was up."""
    canceled = live.stop is not Cause.TIMEOUT
    error = "canceled on request" if canceled else f"its time of {live.order.spec.timeout_s} s was up"
    outcome = Outcome(
        state=TaskState.CANCELED if canceled else TaskState.FAILED,
        started=started or live.started,
        ended=time.time(),
        cause=live.stop,
        error=error,
    )
    return _with_output(outcome, stdout, stderr)


def _crashed(live: _Live, gone: Gone, printed: tuple[Stream, Stream]) -> Outcome:
    message = f"its process {gone.why or how_it_ended(gone.exit_code)} before the function returned."
    return _with_output(_failed(Cause.CRASHED, message, live.started, gone.exit_code), *printed)


def _with_output(outcome: Outcome, stdout: Stream, stderr: Stream) -> Outcome:
    printed = msgspec.structs.replace(outcome, stdout=stdout, stderr=stderr)
    return msgspec.structs.replace(printed, notes=tuple(left_out(printed)))


def _failed(cause: Cause, message: str, started: float | None, exit_code: int | None = None) -> Outcome:
    return Outcome(
        state=TaskState.FAILED, started=started, ended=time.time(), cause=cause, error=message, exit_code=exit_code
    )
