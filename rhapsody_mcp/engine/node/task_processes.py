"""The processes of one task on a node: placed, watched and ended together."""

from __future__ import annotations

import marshal
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from rhapsody_mcp.engine.messages import Plan, RankConfig
from rhapsody_mcp.engine.node.launchers import Placed, Placer, Program, Together, this_host
from rhapsody_mcp.engine.node.pmi import PmiName, rank_environment
from rhapsody_mcp.engine.process.tree import PLACE
from rhapsody_mcp.engine.supervisor import GRACE_S, OWNER_GONE, command
from rhapsody_mcp.engine.task.arguments import arguments_of
from rhapsody_mcp.engine.task.output import left_out, stopped_note
from rhapsody_mcp.engine.task.rank_result import RankEnd, how_it_ended, rank_end
from rhapsody_mcp.engine.task.start_log import NOT_STARTED
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Command, Order, Template, parts_of
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Ref, load_json

if TYPE_CHECKING:
    from rhapsody_mcp.engine.host import Host

__all__ = ["PlacedProcess", "PlacedTask", "in_time"]

T = TypeVar("T")


class PlacedProcess:
    """A supervisor."""

    def __init__(self, host: Host, number: int, template: Template) -> None:
        self.name = f"p{number}"
        self.path = f"{host.config.folder}/{self.name}"
        self._gone = threading.Event()
        env = {**host.task_env, PLACE: f"{host.config.mark}.{number}"}
        self.program = Program(command("supervisor", self.path), env, template)
        self.placed: Placed
        self.why = ""
        """Why `kill` ended it."""

    def program_with(self, module: str, config: msgspec.Struct) -> list[str]:
        """The command that runs a module of this package, which finds its configuration in a file."""
        Path(f"{self.path}.config").write_bytes(msgspec.msgpack.encode(config))
        return [sys.executable, "-P", "-m", f"rhapsody_mcp.engine.{module}", f"{self.path}.config"]

    def prepare(self, plan: Plan) -> None:
        """Write down what it shall do."""
        plan = msgspec.structs.replace(plan, env={**self.program.env, **plan.env})
        Path(self.path).write_bytes(marshal.dumps(msgspec.to_builtins(plan)))

    def place(self, placer: Placer) -> None:
        """Start it by itself; the ranks that a PMI joins are started together."""
        self.placed = placer.place(self.program)

    def join(self) -> int:
        """Wait until it and all that it started has ended; its exit code."""
        code = self.placed.join()
        self._gone.set()
        return -signal.SIGKILL if self.why else code

    def kill(self, why: str) -> None:
        """Kill it with its tree, from another thread than the one that joins it."""
        self.why = why
        self.placed.kill()

    def stop(self) -> None:
        """End it with its tree; returns when that is asked for, and done where it did not help to ask."""
        self.placed.terminate()
        if not self._gone.wait(GRACE_S + 1):
            self.placed.kill()


class PlacedTask:
    """A task in processes of its own, one a rank."""

    def __init__(self, host: Host, order: Order) -> None:
        self.host, self.order, self.uid = host, order, order.spec.uid
        self._placer: Placer = host.forks if order.spec.layout.forked else host.placer
        self.reported = False
        self._stop: Cause | None = None
        self._stopped: Future[None] = Future()
        self._processes: list[PlacedProcess] = []
        self._pmi: PmiName | None = None
        self._together: Together | None = None
        self._failed: int | None = None
        self._ended: set[int] = set()
        self._ends: dict[int, RankEnd | None] = {}
        self._dragged: set[int] = set()
        self._lock = threading.Lock()

    def cancel(self, cause: Cause = Cause.CANCELED) -> None:
        """End all ranks; does not wait."""
        with self._lock:
            if self._stop is None:
                self._stop = cause
                self._stopped.set_result(None)
                _stop_all(self._processes)

    def processes(self) -> list[PlacedProcess]:
        """One a rank that was started."""
        with self._lock:
            return list(self._processes)

    def run(self) -> Outcome | None:
        """Run it to its end; None where the keeper's end ended it, which the backend notices by itself."""
        for template in self.order.spec.layout.templates:
            if wrong := self._impossible(template):
                return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=wrong)
        if wrong := self._find_pmi():
            return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=wrong)
        timer = self._timer(self.order.spec.timeout_s)
        try:
            self._place()
        except InvalidTask as error:
            return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=str(error))
        except Exception as error:  # Dragon raises errors of many kinds
            self.cancel(Cause.LOST)
            self._join()
            message = NOT_STARTED.format(f"{type(error).__name__}: {error}")
            return Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.LOST, error=message)
        else:
            codes = self._join()
        finally:
            if timer is not None:
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

    def _timer(self, timeout_s: float | None) -> threading.Timer | None:
        if timeout_s is None:
            return None
        timer = threading.Timer(timeout_s, lambda: self.cancel(Cause.TIMEOUT))
        timer.daemon = True
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
                process.place(self._placer)
                self._processes.append(process)

    def _place_together(self, pmi: PmiName) -> None:
        """Start all ranks under one PMI; it takes seconds, in which the host goes on.

        Dragon 0.15 has been seen to hang in it, once in some hundred times: then it is tried once more.
        """
        shared = rank_environment(self._memory)

        def start() -> tuple[list[PlacedProcess], Together]:
            processes = [self._process(rank) for rank in range(self.order.spec.layout.ranks)]
            programs = [process.program._replace(env={**shared, **process.program.env}) for process in processes]
            return processes, self.host.placer.place_together(programs, pmi)

        processes, self._together = in_time(start, _TOGETHER_S, undo=lambda late: _undo(late[1]))
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

    def _process(self, rank: int) -> PlacedProcess:
        host, order, layout = self.host, self.order, self.order.spec.layout
        template, work, caps = layout.templates[rank], order.spec.work, host.config.caps
        process = PlacedProcess(host, host.next_number(), template)
        if isinstance(work, Command) and self._are_plain(work):
            arguments = arguments_of(work, order.bindings, load_json)
        else:
            arguments = process.program_with("rank", RankConfig(order, host.config.sys_path, caps))
        env: dict[str, str | None] = {"RHAPSODY_RANK": str(rank), "RHAPSODY_RANKS": str(layout.ranks)}
        if self._placer.sets_affinity and template.gpu_affinity:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, template.gpu_affinity))
        process.prepare(
            Plan(
                arguments,
                host.config.cwd,
                template.cwd or "",
                {**env, **template.env},
                template.cpu_affinity if self._placer.sets_affinity else (),
                caps.output_bytes,
                (order.folder, self.uid, order.attempt),
                host.events_path,
            )
        )
        return process

    def _are_plain(self, work: Command) -> bool:
        """Whether its arguments can be made here, where no user code may run and nothing long is read."""
        parts = chain.from_iterable(map(parts_of, work.arguments))
        used = (self.order.bindings[part.uid] for part in parts if isinstance(part, Ref))
        return all(value.format == "json" and value.file is None for value in used)

    def _join(self) -> list[int]:
        if self._together is None:
            return [process.join() for process in self._processes]
        with ThreadPoolExecutor(len(self._processes)) as waiting:
            return list(waiting.map(self._join_together, range(len(self._processes))))

    def _join_together(self, rank: int) -> int:
        """Wait for a rank; when it has failed, end the others, which would wait for it for ever."""
        code = self._processes[rank].join()
        end = self._left(rank)
        failed = end is None or end.outcome.cause is not None
        with self._lock:
            self._ended.add(rank)
            if failed and self._failed is None and self._stop is None:
                self._failed = rank
                self._dragged = set(range(len(self._processes))) - self._ended
                _stop_all(self._processes[other] for other in self._dragged)
        return code

    def _left(self, rank: int) -> RankEnd | None:
        """What a rank left that has ended, or None where it was killed."""
        if rank not in self._ends:
            path, most = self._processes[rank].path, self.host.config.caps.output_bytes
            try:
                self._ends[rank] = rank_end(path, self.order, rank, most)
            except OSError as error:
                lost = RankOutcome(rank, cause=Cause.ERROR, error=f"what it printed could not be kept: {error}")
                self._ends[rank] = RankEnd(lost, None, time.time())
        return self._ends[rank]

    def _rank_end(self, rank: int, code: int) -> RankEnd:
        found = self._left(rank)
        if found is None:
            error = f"its process {self._processes[rank].why or how_it_ended(code)}."
            found = RankEnd(RankOutcome(rank, exit_code=code, cause=Cause.CRASHED, error=error), None, time.time())
        if rank not in self._dragged or found.outcome.cause is None:
            return found
        error = f"ended because rank {self._failed} failed"
        return found._replace(outcome=msgspec.structs.replace(found.outcome, cause=Cause.CANCELED, error=error))

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
            exception=bad[0].exception if bad and self._stop is None else b"",
            ranks=tuple(ranks) if spec.layout.mode == "job" else (),
            notes=self._notes(ends),
        )

    def _seems_to_want_mpi(self) -> bool:
        """Whether it is a job of independent ranks whose program, or a file among its arguments, speaks of MPI."""
        work, layout = self.order.spec.work, self.order.spec.layout
        if not isinstance(work, Command) or layout.ranks < 2 or layout.pmi is not None:
            return False
        folder = os.path.join(self.host.config.cwd, layout.templates[0].cwd or "")
        names = [work.executable, *(argument for argument in work.arguments if isinstance(argument, str))]
        return any("mpi4py" in name or _speaks_of_mpi(os.path.join(folder, name)) for name in names[:_LOOKED_AT])

    def _notes(self, ends: list[RankEnd]) -> tuple[str, ...]:
        ranks, notes = len(ends), [*left_out(*(found.outcome for found in ends))]
        left = sum(found.left_running for rank, found in enumerate(ends) if rank not in self._dragged)
        if left and self._stop is None:
            notes.append(stopped_note(left))
        if any(found.mpi_alone for found in ends) or self._seems_to_want_mpi():
            notes.append(_MPI_ALONE)
        if ranks > self.host.cores:
            notes.append(f"oversubscribed: {ranks} ranks shared {self.host.cores} cores")
        if self.order.spec.layout.pmi == "none":
            notes.append(f'pmi "none": {ranks} independent ranks, no MPI between them')
        return tuple(notes)


_MPI_ALONE = (
    "its ranks seem to use MPI, and were started without: each is alone, of a world of size 1. For MPI between them "
    'submit it with mpi: true (in Python: "type": "mpi")'
)
_LOOKED_AT = 10


def _speaks_of_mpi(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
    except (OSError, ValueError):  # it is no file
        return False
    return b"mpi4py" in beginning or b"MPI_Init" in beginning


_BEGINNING_BYTES = 1024 * 1024
_TOGETHER_S = (60.0, 120.0)


def in_time(work: Callable[[], T], within_s: Sequence[float], undo: Callable[[T], None]) -> T:
    """What `work` gives, tried once for each of these bounds; what comes too late is undone when it comes.

    Raises what it raises in time, and TimeoutError where it is late each time.
    """
    for bound in within_s:
        answer: Future[T] = Future()
        threading.Thread(target=_answer, args=(work, answer), daemon=True).start()
        try:
            return answer.result(bound)
        except FutureTimeout:
            if answer.done():
                return answer.result()  # at the last moment, or a TimeoutError of its own
            answer.add_done_callback(lambda late: None if late.exception() else undo(late.result()))
    raise TimeoutError(f"no end of it within {' s, and again within '.join(f'{bound:g}' for bound in within_s)} s")


def _answer(work: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(work())
    except Exception as error:  # it belongs to whoever waits for the answer
        answer.set_exception(error)


def _undo(together: Together) -> None:
    for placed in together.ranks:
        placed.terminate()
    with suppress(Exception):  # Dragon raises errors of many kinds
        together.close()


def _stop_all(processes: Iterable[PlacedProcess]) -> None:
    """End them; does not wait."""
    for process in processes:
        threading.Thread(target=process.stop, daemon=True).start()


_STOPPED: dict[Cause, str] = {
    Cause.CANCELED: "canceled on request",
    Cause.TIMEOUT: "its time of {timeout} s was up",
    Cause.LOST: "its process could not be started",
}
