"""Starts the processes of an engine, watches them, and ends them."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from rhapsody_mcp.backends.base import BeforeStart, EngineBook, Progressed, Report
from rhapsody_mcp.backends.compute.crashes import collect_printed, noted_starts, outcomes_after_exit
from rhapsody_mcp.backends.compute.dispatcher import Dispatcher
from rhapsody_mcp.backends.compute.in_flight import InFlightTask, Node
from rhapsody_mcp.backends.compute.process_dispatcher import RunStep
from rhapsody_mcp.backends.compute.transport import Connection, Transport, UnixTransport
from rhapsody_mcp.backends.engine_process import KeeperHandle
from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.backends.output_reads import OutputReads
from rhapsody_mcp.engine.messages import (
    FunctionFinished,
    HostConfig,
    LauncherName,
    NodeReady,
    OutputRead,
    OutputTaken,
    Ping,
    Pong,
    RanksPrepared,
    TaskEnded,
    TaskProgressed,
    TaskRevoked,
    TaskStarted,
    ToBackend,
    WorkerExited,
    WorkerListening,
    WorkerReady,
    WorkerStartFailed,
)
from rhapsody_mcp.engine.process.kept_output import note_results_folder
from rhapsody_mcp.engine.process.liveness import MIN_CHECKS, StopDetector, is_stopped
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.engine.process.tree import ENGINE, end, marked
from rhapsody_mcp.engine.supervisor import GRACE_S
from rhapsody_mcp.engine.task.output import take_output
from rhapsody_mcp.model.errors import BackendUnavailable
from rhapsody_mcp.model.specs import Caps, TaskRun
from rhapsody_mcp.model.values import Stream

__all__ = ["Engine", "EngineConfig"]

_GAVE_UP_TEXT = "leftover files in /dev/shm"
"""The last words of Dragon's launcher when it gives up its start; rarely, the launcher does not exit after them."""
_SHM_FILE = re.compile(r"DD\w+|\w*\d[DM]|warning: \d+ leftover files in /dev/shm: ?")
_LOG_INTERVAL_S = 1.0
_CLOSE_PATIENCE_S = 15.0  # longer than the keeper's own grace
_LOSS_PATIENCE_S = 1.5
_LAST_MESSAGES_S = 2.0


class EngineConfig(NamedTuple):
    """The settings of an engine. `slots` is the number of functions at a time, None for one a core.

    `host_command` makes the command of the node agent from the path of its configuration. `host_environment` makes the
    environment of the node agent from the engine's folder and the environment of the session, `task_environment` makes
    that of tasks on other nodes. `cwd` is the working directory of tasks. `on_loss` is called once if the engine ends
    by itself.
    """

    backend_name: str
    launcher: LauncherName
    num_nodes: int
    slots: int | None
    bundles: bool
    stall_s: float
    caps: Caps
    cwd: str
    environment: Environment
    host_command: Callable[[Path], list[str]]
    host_environment: Callable[[Path, dict[str, str]], dict[str, str]]
    task_environment: Callable[[dict[str, str]], dict[str, str]]
    book: EngineBook | None
    before_start: BeforeStart | None
    on_loss: Callable[[], object]


class Engine:
    """One engine, from the start of its keeper until no process and no file of the engine is left."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.loss: str | None = None
        """Why the engine takes no more tasks; None while it takes tasks."""
        self.dispatcher = Dispatcher(
            on_exit=self._on_worker_exit,
            before_start=config.before_start,
            bundles=config.bundles,
            stop_grace_s=GRACE_S,
            expected_nodes=config.num_nodes,
            run_step=self._run_step,
        )
        self.output_reads = OutputReads()
        self._results_folder = ""
        self.mark = secrets.token_hex(8)
        self.folder = RunDir()
        self._log = self.folder.path / "engine.log"
        self._transport = self._make_transport()
        self._keeper: KeeperHandle | None = None
        self.watches: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None
        self.agents: dict[Connection, Node] = {}
        self._unanswered: Counter[Connection] = Counter()
        self._worker_names: dict[Connection, str] = {}
        self._exit_reporters: dict[str, Connection] = {}
        """The node agent that reported the exit of a worker, by the worker's name."""
        self._exits_in_progress: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self.nodes_ready: asyncio.Future[None] = loop.create_future()
        self._worker_ready: asyncio.Future[None] = loop.create_future()
        self._workers_ready: asyncio.Future[None] = loop.create_future()
        self._workers_silent = asyncio.Event()
        self._workers_silent.set()

    # --- its start

    def _make_transport(self) -> Transport:
        return UnixTransport(self.folder.path)

    async def start(self, limit_s: float) -> None:
        """Start the engine; return when all nodes and a worker can take tasks. The other workers get ready soon after.

        Raises BackendUnavailable where that takes longer than `limit_s`, or where the engine ends before.
        """
        address = await self._transport.listen(self)
        self._keeper = await self._start_keeper(address)
        self.watches.append(asyncio.create_task(self._watch_keeper(self._keeper)))
        log_watch = asyncio.create_task(self._watch_log())
        try:
            async with asyncio.timeout(limit_s):
                await self.nodes_ready
                self.watches.append(asyncio.create_task(self._watch_liveness(self._keeper.pid)))
                if not self.config.bundles:
                    await self._worker_ready
                    self.watches.append(asyncio.create_task(self._watch_worker_starts(limit_s)))
        except TimeoutError as error:
            message = f"the engine of {self.backend_words} was not ready in {limit_s:.0f} s"
            raise BackendUnavailable(message + self.last_words()) from error
        finally:
            log_watch.cancel()

    async def _start_keeper(self, address: str) -> KeeperHandle:
        config, path = self.config, self.folder.path / "host.json"
        path.write_bytes(msgspec.json.encode(self.host_config(self.mark, address, str(self.folder.path))))
        environment = config.host_environment(self.folder.path, await config.environment.build())
        return await self.start_keeper_of(config.host_command(path), environment)

    def host_config(self, mark: str, address: str, folder: str) -> HostConfig:
        config = self.config
        return HostConfig(
            launcher=config.launcher,
            mark=mark,
            address=address,
            folder=folder,
            sys_path=[entry or os.getcwd() for entry in sys.path],
            cwd=config.cwd or os.getcwd(),
            batch=config.bundles,
            stall_s=config.stall_s,
            caps=config.caps,
        )

    async def start_keeper_of(self, command: list[str], environment: dict[str, str]) -> KeeperHandle:
        config = self.config
        keeper = KeeperHandle(self.mark, config.launcher, self.folder.path, config.book)
        options = ["--name", config.backend_name, "--log", str(self._log), "--stop", "close"]
        await keeper.start(options, command, environment)
        return keeper

    def submit(self, task_runs: Sequence[TaskRun], report: Report) -> None:
        """Take these tasks; the engine has started."""
        self.note_results_folder(task_runs)
        self.dispatcher.submit(task_runs, report)

    def note_results_folder(self, task_runs: Sequence[TaskRun]) -> None:
        """Note on the disk where output is kept if this process is killed."""
        if task_runs and task_runs[0].results_folder != self._results_folder:
            self._results_folder = task_runs[0].results_folder
            with suppress(OSError):  # a full disk: only what lost tasks had printed is missing later
                note_results_folder(self.folder.path, self._results_folder, self.config.caps.output_bytes)

    # --- watching

    async def _watch_keeper(self, keeper: KeeperHandle) -> None:
        code = await keeper.wait()
        self.lose(f"the engine of {self.backend_words} ended with exit code {code}{self.last_words()}")

    async def _watch_log(self) -> None:
        """Lose the engine where its launcher has given up and does not exit."""
        while _GAVE_UP_TEXT not in self._read_log():  # noqa: ASYNC110 - a file's growth is no event
            await asyncio.sleep(_LOG_INTERVAL_S)
        self.lose(f"the engine of {self.backend_words} gave up its start{self.last_words()}")

    async def _watch_worker_starts(self, limit_s: float) -> None:
        """Lose the engine where the start of a further worker hangs, because later starts would wait for that start."""
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wait([self._workers_ready])
        except TimeoutError:
            self.lose(f"a worker of {self.backend_words} was not ready in {limit_s:.0f} s{self.last_words()}")

    async def _watch_liveness(self, keeper: int) -> None:
        """Lose the engine where its keeper is stopped (as by SIGSTOP), and find node agents that do not answer pings.

        Unanswered pings count, not seconds: a machine that was asleep has no unanswered pings.
        """
        stop_detector, stall_s = StopDetector(), self.config.stall_s
        while self.loss is None:
            if stop_detector.check([keeper]):
                self.lose(
                    f"the engine of {self.backend_words} stood still: its keeper was stopped for {stall_s:g} s", 0
                )
                return
            for agent in list(self.agents):
                if self._unanswered[agent] >= MIN_CHECKS:
                    self._on_silent_agent(agent)
                self._unanswered[agent] += 1
                agent.send(Ping())
            await asyncio.sleep(stall_s / (MIN_CHECKS - 1))

    def _on_silent_agent(self, agent: Connection) -> None:
        stall_s = self.config.stall_s
        self.lose(f"the engine of {self.backend_words} stood still: its host did not answer for {stall_s:g} s", 0)

    @property
    def backend_words(self) -> str:
        return f"backend {self.config.backend_name!r}"

    def last_words(self) -> str:
        lines = [line for line in self._read_log().splitlines() if line.strip() and not _SHM_FILE.fullmatch(line)]
        return ": " + " | ".join(lines[-5:])[-1000:] if lines else ""

    def _read_log(self) -> str:
        try:
            return self._log.read_text(errors="replace")
        except OSError:
            return ""

    # --- its end

    def lose(self, reason: str, patience_s: float = _LOSS_PATIENCE_S) -> None:
        """End an engine that has failed; after `patience_s` the engine is killed.

        Once none of its processes is left, tasks that had started end with cause lost, and the others are returned.
        """
        if self.loss is None:
            self.config.on_loss()
            self._stop(reason, patience_s)

    async def close(self) -> None:
        """End every process of the engine, then every task; return when none is left."""
        self.dispatcher.mark_canceled()
        if self.loss is None:
            self._stop(f"{self.backend_words} was closed", _CLOSE_PATIENCE_S)
        await self.ended()

    async def ended(self) -> None:
        """Wait until nothing of an engine is left that was closed or lost; return at once for any other."""
        if self._ending is not None:
            await asyncio.shield(self._ending)

    def _stop(self, reason: str, patience_s: float) -> None:
        self.loss = reason
        self.dispatcher.halt()
        for step in (self.nodes_ready, self._worker_ready, self._workers_ready):
            if not step.done():
                step.set_exception(BackendUnavailable(reason))
                step.exception()  # perhaps nobody waits for this step
        self._ending = asyncio.create_task(self._end(reason, patience_s))

    async def _end(self, reason: str, patience_s: float) -> None:
        await self._end_processes(patience_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_MESSAGES_S):
                await self._workers_silent.wait()
        await asyncio.gather(*self._exits_in_progress)
        noted = await noted_starts(self.dispatcher.tasks.values())
        await asyncio.to_thread(collect_printed, self.folder.path, noted, self.dispatcher.tasks, self.config.caps)
        self.dispatcher.abandon(reason, noted)
        for watch in self.watches:
            watch.cancel()
        self._transport.close()
        self.folder.remove()

    async def _end_processes(self, patience_s: float) -> None:
        if self._keeper is not None:
            await self._end_keeper(self._keeper, patience_s)

    async def _end_keeper(self, keeper: KeeperHandle, patience_s: float) -> None:
        """Let the keeper end the engine; where that takes too long, end the engine's processes from here."""
        keeper.stop_engine()
        if not await _ends_within(keeper, patience_s):
            await asyncio.to_thread(end, lambda: marked(ENGINE, self.mark))
            if is_stopped(keeper.pid) or not await _ends_within(keeper, _CLOSE_PATIENCE_S):
                keeper.kill()
        await keeper.wait()

    # --- what its processes say

    def received(self, connection: Connection, messages: Sequence[ToBackend]) -> None:
        finished = {message.uid for message in messages if type(message) is FunctionFinished}
        for message in messages:
            if not (type(message) is TaskStarted and message.uid in finished):  # nobody could see the task run
                self._receive(connection, message)

    def _receive(self, connection: Connection, message: ToBackend) -> None:
        dispatcher = self.dispatcher
        match message:
            case FunctionFinished():
                dispatcher.function_finished(self._worker_names.get(connection, ""), message)
            case TaskStarted():
                dispatcher.task_started(message.uid, message.at)
            case TaskProgressed():
                self._on_progress(message)
            case OutputRead():
                self.output_reads.answer(message.number, message.parts)
            case TaskRevoked():
                dispatcher.task_revoked(message.uid)
            case TaskEnded() if connection in self.agents:
                dispatcher.task_ended(self.agents[connection], message.uid, message.outcome)
            case WorkerReady():
                self._on_worker_ready(connection, message.worker)
            case WorkerListening():
                dispatcher.worker_listening(message.worker, connection)
            case WorkerExited():
                self._exit_reporters[message.worker] = connection
                dispatcher.worker_exited(message)
            case RanksPrepared():
                if (task := dispatcher.tasks.get(message.uid)) is not None:
                    dispatcher.processes.ranks_prepared(self.agents[connection], task, message.scripts)
            case OutputTaken():
                self._on_output_taken(connection, message)
            case WorkerStartFailed():
                self._on_worker_failed(message)
            case Pong():
                self._unanswered[connection] = 0
            case NodeReady():
                self._on_node_ready(connection, message)

    def _on_progress(self, message: TaskProgressed) -> None:
        task = self.dispatcher.tasks.get(message.uid)
        if task is not None and message.rank <= getattr(task, "rank_that_tells", message.rank):
            task.rank_that_tells = message.rank
            task.report(Progressed(task.uid, message.progress))

    def disconnected(self, connection: Connection) -> None:
        worker = self._worker_names.pop(connection, None)
        if worker is not None:
            self.dispatcher.worker_disconnected(worker, connection)
        if not self._worker_names:
            self._workers_silent.set()
        if (node := self.agents.pop(connection, None)) is not None:  # the launcher may stay without its node agent
            node.agent = None
            self._on_agent_gone(connection, node)

    def _on_agent_gone(self, agent: Connection, node: Node) -> None:
        self.lose(f"the engine of {self.backend_words} lost its host{self.last_words()}")

    def _on_node_ready(self, agent: Connection, message: NodeReady) -> None:
        node = Node(
            message.host,
            message.cores,
            worker_slots=self._slots_of(message),
            agent=agent,
            gpus=message.gpus,
            memory_gib=message.memory_gib,
            cpus=message.cpus,
        )
        self.agents[agent] = node
        self.dispatcher.add_node(node)
        if len(self.agents) == self.config.num_nodes:
            _set_done(self.nodes_ready)

    def _slots_of(self, node: NodeReady) -> int:
        return self.config.slots or node.cores

    def _on_worker_ready(self, connection: Connection, worker: str) -> None:
        if self.dispatcher.worker_ready(worker, connection):
            self._worker_names[connection] = worker
            self._workers_silent.clear()
            _set_done(self._worker_ready)
            self.check_workers_ready()

    def _on_worker_failed(self, message: WorkerStartFailed) -> None:
        if self.dispatcher.worker_failed(message.worker):
            self.check_workers_ready()
        else:
            self.lose(f"{self.backend_words} could not place a worker: {message.error}")

    def check_workers_ready(self) -> None:
        if self.dispatcher.all_workers_ready:
            _set_done(self._workers_ready)

    def _on_worker_exit(self, tasks: Sequence[InFlightTask], exited: WorkerExited) -> None:
        """Finish those tasks of a worker that has exited which had started, and requeue the others."""
        finishing = asyncio.create_task(self._finish_started(tasks, exited))
        self._exits_in_progress.add(finishing)
        finishing.add_done_callback(self._exits_in_progress.discard)

    async def _finish_started(self, tasks: Sequence[InFlightTask], exited: WorkerExited) -> None:
        agent = self._exit_reporters.pop(exited.worker)
        async for task, outcome in outcomes_after_exit(tasks, exited, partial(self._take_output, agent)):
            self.dispatcher.finish(task, outcome)
        self.dispatcher.requeue(tasks)

    _run_step: RunStep | None = None
    """One node starts the ranks of MPI jobs through Dragon."""

    async def _take_output(self, agent: Connection, path: str, folder: str | None) -> tuple[Stream, Stream]:
        return await asyncio.to_thread(take_output, path, folder, self.config.caps.output_bytes)

    def _on_output_taken(self, agent: Connection, message: OutputTaken) -> None:
        """Do nothing: the engine takes outputs by itself."""


def _set_done(step: asyncio.Future[None]) -> None:
    if not step.done():
        step.set_result(None)


async def _ends_within(keeper: KeeperHandle, within_s: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await keeper.wait()
            return True
    return False
