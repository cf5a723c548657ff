"""The program that runs on a node, inside Dragon or without it: it places processes, watches them, ends them.

    python -m rhapsody_mcp.engine.host CONFIG

It ends when the lifeline closes, with everything that it placed.
"""

from __future__ import annotations

import json
import os
import queue
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rhapsody_mcp.engine.link import Link
from rhapsody_mcp.engine.placers import (
    TASK_VARIABLES,
    DragonPlacer,
    LocalPlacer,
    Placed,
    Placer,
    Program,
    Together,
    count_cores,
    count_gpus,
    this_host,
)
from rhapsody_mcp.engine.pmi import PmiName, Prober, rank_environment
from rhapsody_mcp.engine.processes import PLACE, adopt_orphans, end, marked, open_lifeline
from rhapsody_mcp.engine.supervisor import GRACE_S, OWNER_GONE, RankEnd, how_it_ended
from rhapsody_mcp.engine.wire import (
    Ask,
    Ended,
    Failed,
    FromHost,
    Gone,
    HostConfig,
    Place,
    PlaceConfig,
    Ready,
    Started,
    Stop,
    ToHost,
)
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Order, Template
from rhapsody_mcp.model.states import Cause, TaskState

__all__ = ["main"]


def main() -> None:
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=HostConfig)
    adopt_orphans()
    placer: Placer = DragonPlacer() if config.placer == "dragon" else LocalPlacer()
    host = _Host(config, placer)
    threading.Thread(target=_end_with_owner, args=(host,), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        host.serve()
    host.end()


def _end_with_owner(host: _Host) -> None:
    """Wait for the lifeline to close, then end everything."""
    os.read(open_lifeline(), 1)
    host.end()


_JOIN_S = 3.0


def _batch_placer() -> Placer:
    from rhapsody_mcp.engine.batch import BatchPlacer

    return BatchPlacer()


class _Host:
    """The main thread talks with the backend; each task and each worker has a thread that waits for its end."""

    def __init__(self, config: HostConfig, placer: Placer) -> None:
        self.config, self.placer = config, placer
        self._worker_placer = _batch_placer() if config.batch else placer
        self.cores = count_cores()
        self.gpus = count_gpus()
        self.task_env: dict[str, str] = json.loads(os.environ.get(TASK_VARIABLES, "{}"))
        self.prober = Prober(config.folder, config.sys_path)
        self._number = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ending = False
        self._workers: dict[str, _Process] = {}
        self._tasks: dict[str, _Task] = {}
        self._outbox: queue.SimpleQueue[FromHost] = queue.SimpleQueue()
        self._awake, self._wake = os.pipe()
        self._events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.events_path = f"{config.folder}/started"
        self._events.bind(self.events_path)

    def serve(self) -> None:
        backend: Link[ToHost] = Link(self.config.address, ToHost)
        self.say(Ready(socket.gethostname(), os.getpid(), self.cores, self.gpus))
        while True:
            sources: list[Any] = [backend.socket, self._awake, self._events]
            readable, _, _ = select.select(sources, [], [])
            if backend.socket in readable:
                for message in backend.receive():
                    self._obey(message)
            if self._events in readable:
                self._hear_started()
            if self._awake in readable:
                os.read(self._awake, 4096)
                self._send(backend)

    def end(self) -> NoReturn:
        """End what was placed, then this process.

        With os._exit, because sys.exit waits for Dragon's threads. Not while a thread here waits for a process:
        it may hold a lock in the memory that it shares with Dragon's launcher, which then never ends.
        """
        self._ending = True
        self.prober.stop()
        deadline = time.monotonic() + _JOIN_S
        for thread in list(self._threads):
            end(lambda: marked(PLACE, self.config.mark))
            thread.join(max(0.0, deadline - time.monotonic()))
        os._exit(0)

    def _run(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads = [thread, *(other for other in self._threads if other.is_alive())]
        thread.start()

    def say(self, message: FromHost) -> None:
        """Send a message, from any thread; nothing while everything is being ended, which is no news."""
        if not self._ending:
            self._outbox.put(message)
            os.write(self._wake, b"\0")

    def _send(self, backend: Link[ToHost]) -> None:
        messages: list[FromHost] = []
        with suppress(queue.Empty):
            while True:
                messages.append(self._outbox.get_nowait())
        if messages:
            backend.send(*messages)

    def _hear_started(self) -> None:
        uid, at = msgspec.msgpack.decode(self._events.recv(4096), type=tuple[str, float])
        task = self._tasks.get(uid)
        if task is not None and not task.reported:
            task.reported = True
            self.say(Started(uid, at))

    def _obey(self, message: ToHost) -> None:
        if self._ending:
            return
        if isinstance(message, Place):
            self._run(self._run_worker, message.worker)
        elif isinstance(message, Stop):
            if message.worker in self._workers:
                threading.Thread(target=self._workers[message.worker].stop, daemon=True).start()
        elif isinstance(message, Ask):
            task = self._tasks[message.order.spec.uid] = _Task(self, message.order)
            self._run(self._run_task, task)
        elif message.uid in self._tasks:
            self._tasks[message.uid].cancel()

    def _run_worker(self, worker: str) -> None:
        config = PlaceConfig(
            number=self.next_number(),
            folder=self.config.folder,
            sys_path=self.config.sys_path,
            cwd=self.config.cwd,
            worker=worker,
            address=self.config.address,
        )
        try:
            process = _Process(self, config, Template())
            process.place(self._worker_placer)
            self._workers[worker] = process
        except Exception as error:  # Dragon raises errors of many kinds
            self.say(Failed(worker, str(error)))
            return
        code = process.join()
        if code == OWNER_GONE:
            return
        del self._workers[worker]
        self.say(Gone(worker, code if code <= 128 else 128 - code))

    def _run_task(self, task: _Task) -> None:
        outcome = task.run()
        if outcome is not None:
            del self._tasks[task.uid]
            self.say(Ended(task.uid, outcome))

    def next_number(self) -> int:
        with self._lock:
            self._number += 1
            return self._number


class _Process:
    """A supervisor."""

    def __init__(self, host: _Host, config: PlaceConfig, template: Template) -> None:
        self.path = f"{config.folder}/p{config.number}"
        self._place = f"{host.config.mark}.{config.number}"
        self._gone = threading.Event()
        Path(self.path).write_bytes(msgspec.msgpack.encode(config))
        command = [sys.executable, "-m", "rhapsody_mcp.engine.supervisor", self.path]
        self.program = Program(command, {**host.task_env, PLACE: self._place}, template)
        self.placed: Placed
        self._left: RankEnd | None = None

    def place(self, placer: Placer) -> None:
        """Start it by itself; the ranks that a PMI joins are started together."""
        self.placed = placer.place(self.program)

    def join(self) -> int:
        """Wait until it and all that it started has ended; its exit code."""
        code = self.placed.join()
        end(lambda: marked(PLACE, self._place))
        self._gone.set()
        return code

    def stop(self) -> None:
        """End it with its tree; returns when that is asked for, and done where it did not help to ask."""
        self.placed.terminate()
        if not self._gone.wait(GRACE_S + 1):
            end(lambda: marked(PLACE, self._place))

    def rank_end(self) -> RankEnd | None:
        """What it left, or None where it was killed."""
        left = Path(f"{self.path}.outcome")
        if self._left is None and left.exists():
            self._left = msgspec.msgpack.decode(left.read_bytes(), type=RankEnd)
            left.unlink()
        return self._left


class _Task:
    """A task in processes of its own, one a rank."""

    def __init__(self, host: _Host, order: Order) -> None:
        self.host, self.order, self.uid = host, order, order.spec.uid
        self.reported = False
        self._stop: Cause | None = None
        self._stopped: Future[None] = Future()
        self._processes: list[_Process] = []
        self._pmi: PmiName | None = None
        self._together: Together | None = None
        self._failed: int | None = None
        self._ended: set[int] = set()
        self._dragged: set[int] = set()
        self._lock = threading.Lock()

    def cancel(self, cause: Cause = Cause.CANCELED) -> None:
        """End all ranks; does not wait."""
        with self._lock:
            if self._stop is None:
                self._stop = cause
                self._stopped.set_result(None)
                _stop_all(self._processes)

    def run(self) -> Outcome | None:
        """Run it to its end; None where the keeper's end ended it, which the backend notices by itself."""
        for template in self.order.spec.layout.templates:
            if wrong := self._impossible(template):
                return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=wrong)
        if wrong := self._find_pmi():
            return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=wrong)
        timer = self._timer()
        try:
            self._place()
        except Exception as error:  # Dragon raises errors of many kinds
            self.cancel(Cause.LOST)
            self._join()
            message = f"its process could not be started: {type(error).__name__}: {error}"
            return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.LOST, error=message)
        codes = self._join()
        timer.cancel()
        if OWNER_GONE in codes:
            return None
        outcome = self._outcome([self._rank_end(rank, code) for rank, code in enumerate(codes)])
        self._free()
        return outcome

    def _free(self) -> None:
        """Give back what a job under a PMI had besides its processes."""
        if self._together is not None:
            with suppress(Exception):  # Dragon raises errors of many kinds; the ranks have ended well or badly before
                self._together.close()
            shutil.rmtree(self._memory, ignore_errors=True)

    def _find_pmi(self) -> str:
        """Learn which PMI its ranks get; why there is none, empty where there is or it needs none."""
        wanted = self.order.spec.layout.pmi
        if wanted is None or wanted == "none":
            return ""
        answer = self.host.prober.find(wanted)
        either: list[Future[Any]] = [answer, self._stopped]
        wait(either, return_when=FIRST_COMPLETED)
        if self._stopped.done():
            return ""
        self._pmi = answer.result().pmi
        return answer.result().problem

    def _impossible(self, template: Template) -> str:
        """What this node cannot give; empty where it can."""
        if not this_host(template.host_name):
            return f"host_name {template.host_name!r} is no node of this engine; it has {socket.gethostname()!r}."
        if missing := [gpu for gpu in template.gpu_affinity if gpu >= self.host.gpus]:
            return f"GPU {missing[0]} was asked for; {socket.gethostname()} has {self.host.gpus or 'no'} GPUs."
        usable = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(self.host.cores))
        if missing := [cpu for cpu in template.cpu_affinity if cpu not in usable]:
            return f"CPU {missing[0]} was asked for; {socket.gethostname()} has CPUs {sorted(usable)}."
        return ""

    def _timer(self) -> threading.Timer:
        timer = threading.Timer(self.order.spec.timeout_s or 0, lambda: self.cancel(Cause.TIMEOUT))
        timer.daemon = True
        if self.order.spec.timeout_s:
            timer.start()
        return timer

    def _place(self) -> None:
        if self._pmi is not None:
            self._place_together(self._pmi)
            return
        for rank in range(self.order.spec.layout.ranks):
            process = self._process(rank)
            with self._lock:
                if self._stop is not None:
                    return
                process.place(self.host.placer)
                self._processes.append(process)

    def _place_together(self, pmi: PmiName) -> None:
        """Start all ranks under one PMI; it takes a second, in which the host goes on."""
        processes = [self._process(rank) for rank in range(self.order.spec.layout.ranks)]
        shared = rank_environment(self._memory)
        programs = [process.program for process in processes]
        programs = [program._replace(env={**shared, **program.env}) for program in programs]
        self._together = self.host.placer.place_together(programs, pmi)
        for process, placed in zip(processes, self._together.ranks, strict=True):
            process.placed = placed
        with self._lock:
            self._processes = processes
            if self._stop is not None:
                _stop_all(processes)

    @property
    def _memory(self) -> Path:
        """A folder for what the MPI library shares between the ranks."""
        return Path(self.host.config.folder, f"mpi-{self.uid}")

    def _process(self, rank: int) -> _Process:
        host = self.host
        config = PlaceConfig(
            number=host.next_number(),
            folder=host.config.folder,
            sys_path=host.config.sys_path,
            cwd=host.config.cwd,
            order=self.order,
            rank=rank,
            sets_affinity=host.placer.sets_affinity,
            started=host.events_path,
        )
        return _Process(host, config, self.order.spec.layout.templates[rank])

    def _join(self) -> list[int]:
        if self._together is None:
            return [process.join() for process in self._processes]
        with ThreadPoolExecutor(len(self._processes)) as waiting:
            return list(waiting.map(self._join_together, range(len(self._processes))))

    def _join_together(self, rank: int) -> int:
        """Wait for a rank; when it has failed, end the others, which would wait for it for ever."""
        code = self._processes[rank].join()
        end = self._processes[rank].rank_end()
        failed = end is None or end.outcome.cause is not None
        with self._lock:
            self._ended.add(rank)
            if failed and self._failed is None and self._stop is None:
                self._failed = rank
                self._dragged = set(range(len(self._processes))) - self._ended
                _stop_all(self._processes[other] for other in self._dragged)
        return code

    def _rank_end(self, rank: int, code: int) -> RankEnd:
        found = self._processes[rank].rank_end()
        if found is None:
            error = f"its process {how_it_ended(code)}."
            found = RankEnd(RankOutcome(rank, exit_code=code, cause=Cause.CRASHED, error=error), None, time.time())
        if rank not in self._dragged or found.outcome.cause is None:
            return found
        error = f"ended because rank {self._failed} failed"
        outcome = msgspec.structs.replace(found.outcome, cause=Cause.CANCELED, error=error)
        return msgspec.structs.replace(found, outcome=outcome)

    def _outcome(self, ends: list[RankEnd]) -> Outcome:
        """The task's outcome: DONE where every rank is; its value, output and exit code are rank 0's, or the first
        failed rank's exit code."""
        ranks = [found.outcome for found in ends]
        bad = [rank for rank in ranks if rank.cause is not None]
        bad.sort(key=lambda rank: rank.rank != self._failed)  # what failed first, where that is known
        spec = self.order.spec
        state, cause, error, trace = TaskState.DONE, None, "", ""
        if self._stop is not None:
            state = TaskState.CANCELED if self._stop is Cause.CANCELED else TaskState.FAILED
            cause, error = self._stop, _STOPPED[self._stop].format(timeout=spec.timeout_s)
        elif bad:
            where = f"rank {bad[0].rank} of {len(ranks)}: " if spec.layout.mode == "job" else ""
            state, cause, error, trace = TaskState.FAILED, bad[0].cause, where + bad[0].error, bad[0].traceback
        first = ranks[0] if ranks else RankOutcome(0)
        return Outcome(
            state=state,
            started=min((found.started for found in ends if found.started is not None), default=None),
            ended=max((found.ended for found in ends), default=time.time()),
            value=first.value if state is TaskState.DONE else None,
            stdout=first.stdout,
            stderr=first.stderr,
            exit_code=(bad[0] if bad else first).exit_code,
            cause=cause,
            error=error,
            traceback=trace,
            ranks=tuple(ranks) if spec.layout.mode == "job" else (),
            notes=self._notes(len(ranks)),
        )

    def _notes(self, ranks: int) -> tuple[str, ...]:
        notes = []
        if ranks > self.host.cores:
            notes.append(f"oversubscribed: {ranks} ranks shared {self.host.cores} cores")
        if self.order.spec.layout.pmi == "none":
            notes.append(f'pmi "none": {ranks} independent ranks, no MPI between them')
        return tuple(notes)


def _stop_all(processes: Iterable[_Process]) -> None:
    """End them; does not wait."""
    for process in processes:
        threading.Thread(target=process.stop, daemon=True).start()


_STOPPED: dict[Cause, str] = {
    Cause.CANCELED: "canceled on request",
    Cause.TIMEOUT: "its time of {timeout} s was up",
    Cause.LOST: "its process could not be started",
}


if __name__ == "__main__":
    main()
