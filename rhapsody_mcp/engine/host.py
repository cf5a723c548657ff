"""The node agent, inside Dragon or without it: it launches processes, watches them and ends them.

    python -m rhapsody_mcp.engine.host CONFIG

When the lifeline closes, the node agent ends with everything that it launched.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rhapsody_mcp.engine.live.printed import current_uid, read_printed_in_worker
from rhapsody_mcp.engine.messages import (
    FromHost,
    HostConfig,
    NodeReady,
    OutputRead,
    OutputTaken,
    Ping,
    Pong,
    ProcessPlan,
    ReadOutput,
    StartTask,
    StartWorker,
    StepEnded,
    StopWorker,
    TakeOutput,
    TaskEnded,
    TaskProgressed,
    TaskStarted,
    ToHost,
    WorkerConfig,
    WorkerExited,
    WorkerStartFailed,
)
from rhapsody_mcp.engine.node.context import NodeContext, start_events_path
from rhapsody_mcp.engine.node.hardware import memory_gib, usable_cpus
from rhapsody_mcp.engine.node.launchers import DragonLauncher, ForkLauncher, Launcher
from rhapsody_mcp.engine.node.memory_watch import LOOK_S, WatchedProcess, watch_memory
from rhapsody_mcp.engine.node.supervised_process import SupervisedProcess
from rhapsody_mcp.engine.node.task_processes import ProcessTask
from rhapsody_mcp.engine.process.liveness import MIN_CHECKS, StopDetector
from rhapsody_mcp.engine.process.tree import PROCESS_MARK, adopt_orphans, descendants, end, marked, open_lifeline
from rhapsody_mcp.engine.supervisor import OWNER_GONE
from rhapsody_mcp.engine.task.error_text import error_message
from rhapsody_mcp.engine.task.node_files import local_task_run, results_folder
from rhapsody_mcp.engine.task.output import take_output
from rhapsody_mcp.engine.task.start_log import NOT_STARTED
from rhapsody_mcp.engine.transport import Link
from rhapsody_mcp.model.outcome import Outcome, failed
from rhapsody_mcp.model.specs import Template
from rhapsody_mcp.model.states import Cause

__all__ = ["main"]


def main() -> None:
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=HostConfig)
    adopt_orphans()
    agent = NodeAgent(config)
    threading.Thread(target=_end_with_owner, args=(agent,), daemon=True).start()
    threading.Thread(target=agent.end_stalled, daemon=True).start()
    threading.Thread(target=agent.report_progress, daemon=True).start()
    threading.Thread(target=watch_memory, args=(agent.processes_with_memory,), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        agent.serve()
    agent.end("the connection with the backend has ended")


def _end_with_owner(agent: NodeAgent) -> None:
    """Wait for the lifeline to close, then end everything."""
    os.read(open_lifeline(), 1)
    agent.end("the keeper has closed the lifeline")


_JOIN_TIMEOUT_S = 3.0
_PROGRESS_S = 0.25


def _batch_launcher() -> Launcher:
    from rhapsody_mcp.engine.node.dragon_batch import BatchLauncher

    return BatchLauncher()


class NodeAgent:
    """The main thread exchanges messages with the backend. A thread for each task and each worker waits for its end."""

    def __init__(self, config: HostConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._work_queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle_threads = 0
        self._runs: set[Future[None]] = set()
        self._ending = False
        self._workers: dict[str, SupervisedProcess] = {}
        self._tasks: dict[str, ProcessTask] = {}
        self.watched: dict[str, list[int]] = {}
        """Name of a running plan to the processes that are ended if they stay stopped."""
        self._outbox: queue.SimpleQueue[FromHost] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe()
        self._start_events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._start_events.bind(start_events_path(config.folder))
        self._fork_launcher = ForkLauncher(config.folder, self._end_without_fork_server)
        self._node = NodeContext(
            config,
            DragonLauncher() if config.launcher == "dragon" else self._fork_launcher,
            self._fork_launcher,
            self.send,
        )
        self._worker_launcher = _batch_launcher() if config.batch else self._node.launcher

    def serve(self) -> None:
        backend: Link[ToHost] = Link(self.config.address, ToHost)
        node = self._node
        self.send(NodeReady(socket.gethostname(), os.getpid(), node.cores, node.gpus, memory_gib(), usable_cpus()))
        while True:
            sources: list[Any] = [backend.socket, self._wake_reader, self._start_events]
            readable, _, _ = select.select(sources, [], [])
            if backend.socket in readable:
                for message in backend.receive():
                    self._handle(message)
            if self._start_events in readable:
                self._receive_start_event()
            if self._wake_reader in readable:
                os.read(self._wake_reader, 4096)
                self._send_outbox(backend)

    def end(self, reason: str) -> NoReturn:
        """End what was launched, then this process. The reason goes into the log.

        This calls os._exit, because sys.exit would wait for Dragon's threads. It first waits for the threads here that
        wait for processes: such a thread may hold a lock in the memory that it shares with Dragon's launcher, and the
        launcher would never end.
        """
        if not self._ending:
            sys.stderr.write(f"{reason}\n")
        self._ending = self._node.is_ending = True
        self._fork_launcher.resolve_all()
        self._node.pmi_prober.stop()
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        for run in list(self._runs):
            end(self._all_processes)
            wait([run], max(0.0, deadline - time.monotonic()))
        os._exit(0)

    def _end_without_fork_server(self) -> NoReturn:
        self.end("the host's fork server has ended")

    def _all_processes(self) -> set[int]:
        """Return the launched processes and their descendants: a supervisor that is killed cannot end its own
        descendants."""
        launched = {os.getpid(), *marked(PROCESS_MARK, self.config.mark)}
        return launched.union(*map(descendants, launched)) - {os.getpid()}

    def _run_in_thread(self, target: Callable[..., None], *args: object) -> None:
        """Run `target` at once, in an idle thread or in a new one."""
        self._work_queue.put(partial(target, *args))
        with self._lock:
            has_idle_thread = self._idle_threads > 0
            self._idle_threads -= has_idle_thread
        if not has_idle_thread:
            threading.Thread(target=self._serve_work_queue, daemon=True).start()

    def _serve_work_queue(self) -> None:
        while True:
            work, run = self._work_queue.get(), Future[None]()
            self._runs.add(run)
            try:
                work()
            except Exception:  # as for an exception that ends a thread
                sys.excepthook(*sys.exc_info())
            self._runs.discard(run)
            run.set_result(None)
            with self._lock:
                self._idle_threads += 1

    def send(self, message: FromHost) -> None:
        """Send a message, from any thread. While this process ends, messages are dropped."""
        if not self._ending:
            self._outbox.put(message)
            os.write(self._wake_writer, b"\0")

    def _send_outbox(self, backend: Link[ToHost]) -> None:
        messages: list[FromHost] = []
        with suppress(queue.Empty):
            while True:
                messages.append(self._outbox.get_nowait())
        if messages:
            backend.send(*messages)

    def _receive_start_event(self) -> None:
        name, pids, at, uid = self._start_events.recv(4096).decode().split(" ", 3)
        task = self._tasks.get(uid)
        if task is not None or not uid:
            self.watched[name] = [int(pid) for pid in pids.split(",")]
        if task is not None and task.started_at is None:
            task.started_at = float(at)
            self.send(TaskStarted(uid, float(at)))

    def _handle(self, message: ToHost) -> None:
        if self._ending:
            return
        if isinstance(message, Ping):
            self.send(Pong())
        elif isinstance(message, StartWorker):
            self._run_in_thread(self._run_worker, message.worker)
        elif isinstance(message, TakeOutput):
            self._run_in_thread(self._take_output, message)
        elif isinstance(message, ReadOutput):
            self._run_in_thread(self._read_output, message)
        elif isinstance(message, StopWorker):
            if message.worker in self._workers:
                threading.Thread(target=self._workers[message.worker].stop, daemon=True).start()
        elif isinstance(message, StartTask):
            task = self._tasks[message.task_run.spec.uid] = ProcessTask(self._node, message)
            self._run_in_thread(self._run_task, task)
        elif isinstance(message, StepEnded):
            if message.uid in self._tasks:
                self._tasks[message.uid].end_step(message.problem)
        elif message.uid in self._tasks:
            self._end_task(self._tasks[message.uid], message.failed_rank)

    def _end_task(self, task: ProcessTask, failed_rank: int | None) -> None:
        if failed_rank is None:
            task.cancel()
        else:
            task.fail(failed_rank)

    def _run_worker(self, worker: str) -> None:
        agent_config = self.config
        config = WorkerConfig(
            worker,
            agent_config.address,
            agent_config.sys_path,
            agent_config.cwd,
            agent_config.caps,
            agent_config.link_folder,
        )
        try:
            process = SupervisedProcess(self._node, Template())
            plan = ProcessPlan(
                process.module_command("worker", config),
                env={"PWD": agent_config.cwd},
                output_bytes=agent_config.caps.output_bytes,
                start_events=self._node.start_events,
            )
            process.write_plan(plan)
            process.launch(self._worker_launcher)
            self._workers[worker] = process
        except Exception as error:  # Dragon raises errors of many kinds
            self.send(WorkerStartFailed(worker, str(error)))
            return
        code = process.join()
        if code == OWNER_GONE:
            return
        del self._workers[worker]
        self.watched.pop(process.name, None)
        self.send(WorkerExited(worker, code if code <= 128 else 128 - code, process.kill_reason, process.path))

    def _take_output(self, request: TakeOutput) -> None:
        folder = request.results_folder and results_folder(request.results_folder, self.config.link_folder)
        streams = take_output(request.output_path, folder, request.output_bytes)
        self.send(OutputTaken(request.output_path, *streams))

    def _read_output(self, request: ReadOutput) -> None:
        printed, uid = None, request.uid
        if (worker := self._workers.get(request.worker)) is not None:
            printed = read_printed_in_worker(worker.path, uid, request.query, self.config.caps.output_bytes)
        elif (task := self._tasks.get(uid)) is not None:
            printed = task.printed(request.query)
        self.send(OutputRead(request.number, printed))

    def report_progress(self) -> NoReturn:
        """Repeatedly read what running tasks tell of their progress, and report what is new."""
        while True:
            time.sleep(_PROGRESS_S)
            for task in list(self._tasks.values()):
                for message in task.advanced():
                    self.send(message)
            for worker in list(self._workers.values()):
                told = worker.progress
                if told.advance() and told.progress is not None:
                    with suppress(OSError):  # out of file descriptors: what comes next may be told
                        uid = told.uid or current_uid(worker.path)
                        self.send(TaskProgressed(uid, 0, told.progress))

    def processes_with_memory(self) -> list[WatchedProcess]:
        """Return the running processes of tasks in processes of their own. What short ones without a limit have used is
        known at their ends."""
        found: list[WatchedProcess] = []
        now = time.time()
        for task in list(self._tasks.values()):
            limit = task.task_run.spec.layout.needs.memory_bytes
            if limit is None and task.started_at is not None and now - task.started_at < LOOK_S:
                continue
            started = ((process, self._pids(process)) for process in task.processes())
            found += [WatchedProcess(process, pids[0], limit) for process, pids in started if pids]
        return found

    def end_stalled(self) -> NoReturn:
        """Repeatedly check for processes that stay stopped: end a worker or a supervisor with its tree, or everything
        if the launcher or the fork server is stopped."""
        stop_detector, stalled = StopDetector(), f"was stopped (as by SIGSTOP) for {self.config.stall_s:g} s"
        launchers = [os.getppid(), self._fork_launcher.pid]
        while True:
            time.sleep(self.config.stall_s / (MIN_CHECKS - 1))
            launched = {pid: process for process in self._processes() for pid in self._pids(process)}
            for pid in stop_detector.check([*launchers, *launched]):
                if pid in launchers:
                    self.end(f"what started the host, or its fork server, {stalled}")
                launched[pid].kill(f"{stalled}, and was ended for that")

    def _pids(self, process: SupervisedProcess) -> Sequence[int]:
        return () if process.has_ended else self.watched.get(process.name, ())

    def _processes(self) -> list[SupervisedProcess]:
        ranks = (process for task in list(self._tasks.values()) for process in task.processes())
        return [*list(self._workers.values()), *ranks]

    def _run_task(self, task: ProcessTask) -> None:
        try:
            outcome = self._outcome(task)
        except Exception as error:  # whatever it is, the task ends and gives back its cores
            sys.excepthook(*sys.exc_info())
            task.abandon()
            outcome = failed(Cause.ERROR, f"the node agent could not see it to its end: {error_message(error)}")
        if outcome is not None:
            del self._tasks[task.uid]
            for process in task.processes():
                self.watched.pop(process.name, None)
            self.send(TaskEnded(task.uid, outcome))

    def _outcome(self, task: ProcessTask) -> Outcome | None:
        try:
            task.task_run = local_task_run(task.task_run, self.config.link_folder)
        except OSError as error:
            return failed(Cause.LOST, NOT_STARTED.format(error))
        return task.run()


if __name__ == "__main__":
    main()
