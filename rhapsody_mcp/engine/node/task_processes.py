"""The processes of one task on a node: launched, watched and ended together."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.engine.live.printed import read_printed
from rhapsody_mcp.engine.messages import (
    Devices,
    FunctionResult,
    ProcessPlan,
    RanksPrepared,
    StartTask,
    TaskProgressed,
)
from rhapsody_mcp.engine.node.context import NodeContext
from rhapsody_mcp.engine.node.hardware import device_variables
from rhapsody_mcp.engine.node.launchers import Launcher, ProcessGroup
from rhapsody_mcp.engine.node.mpi_hint import may_use_mpi
from rhapsody_mcp.engine.node.pmi import PmiName, rank_environment
from rhapsody_mcp.engine.node.step_launcher import StepGroup
from rhapsody_mcp.engine.node.supervised_process import SupervisedProcess
from rhapsody_mcp.engine.node.task_software import TaskSoftware
from rhapsody_mcp.engine.node.timeouts import call_with_timeouts
from rhapsody_mcp.engine.supervisor import OWNER_GONE
from rhapsody_mcp.engine.task.arguments import arguments_of
from rhapsody_mcp.engine.task.kept_files import with_outputs
from rhapsody_mcp.engine.task.output import left_out, stopped_note, take_output
from rhapsody_mcp.engine.task.rank_result import RankEnd, how_it_ended, rank_end
from rhapsody_mcp.engine.task.start_log import NOT_STARTED
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.live.output import OutputQuery, Printed
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Measured, Outcome, RankOutcome, failed, why_stopped
from rhapsody_mcp.model.specs import Command, Completion, Template, parts_of
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Ref, load_json
from rhapsody_mcp.task import VARIABLE as PROGRESS_VARIABLE

__all__ = ["ProcessTask"]


class ProcessTask:
    """The ranks of a task on this node, each in a process of its own."""

    def __init__(self, node: NodeContext, message: StartTask) -> None:
        self.node, self.task_run, self.uid = node, message.task_run, message.task_run.spec.uid
        task_run = self.task_run
        self._ranks = message.ranks or tuple(range(task_run.spec.layout.ranks))
        self._templates = task_run.spec.layout.templates
        self._nodes = message.nodes
        self._devices = dict(zip(self._ranks, message.devices, strict=False))
        self._launcher: Launcher = node.fork_launcher if task_run.spec.layout.forked else node.launcher
        self.started_at: float | None = None
        self._stop_cause: Cause | None = None
        self._stop_requested: Future[None] = Future()
        self._processes: dict[int, SupervisedProcess] = {}
        """By rank."""
        self._in_step = message.in_step
        self._pmi: PmiName | None = None
        self._group: ProcessGroup | None = None
        self._failed_rank: int | None = None
        """The rank whose failure ended the others; it may be on another node."""
        self._ended_ranks: set[int] = set()
        self._rank_ends: dict[int, RankEnd | None] = {}
        self._ranks_ended_with_failed: set[int] = set()
        self._lock = threading.Lock()

    def cancel(self, cause: Cause = Cause.CANCELED) -> None:
        """Start to end all ranks, and return at once."""
        with self._lock:
            if self._stop_cause is None:
                self._stop_cause = cause
                self._stop_requested.set_result(None)
                _stop_all(self._processes.values())

    def fail(self, rank: int) -> None:
        """Start to end all ranks that still run, because this rank has failed, and return at once."""
        with self._lock:
            if self._failed_rank is None and self._stop_cause is None:
                self._failed_rank = rank
                self._ranks_ended_with_failed = set(self._ranks) - self._ended_ranks
                _stop_all(self._processes[other] for other in self._ranks_ended_with_failed & self._processes.keys())

    def processes(self) -> list[SupervisedProcess]:
        """Return the supervised processes of the ranks that were started."""
        with self._lock:
            return list(self._processes.values())

    def run(self) -> Outcome | None:
        """Run the task to its end. Return None if the end of the keeper or of the node agent ended the task: the
        backend notices that by itself."""
        try:
            self._software = TaskSoftware(self.node, self.task_run)
        except InvalidTask as error:
            return failed(Cause.INVALID, str(error))
        for rank in self._ranks:
            if error_text := self._template_error(self._templates[rank]):
                return failed(Cause.INVALID, error_text)
        if error_text := self._find_pmi():
            return failed(Cause.INVALID, error_text)
        timer = self._timer(self.task_run.spec.timeout_s)
        try:
            self._launch()
        except InvalidTask as error:
            return failed(Cause.INVALID, str(error))
        except Exception as error:  # Dragon raises errors of many kinds
            self.cancel(Cause.LOST)
            self._join()
            return failed(Cause.LOST, NOT_STARTED.format(f"{type(error).__name__}: {error}"))
        else:
            codes = self._join()
        finally:
            if timer is not None:
                timer.cancel()
        if OWNER_GONE in codes.values() or self.node.is_ending:
            return None
        ends = [self._final_rank_end(rank, code) for rank, code in codes.items()]
        if self._failed_rank is not None:
            ends += [self._not_started(rank) for rank in self._ranks if rank not in codes]
        outcome = self._outcome(ends)
        self._free_group()
        return outcome

    def abandon(self) -> None:
        """End all ranks, and return when they have ended."""
        self.cancel(Cause.LOST)
        for process in self.processes():
            if not process.has_ended:
                with suppress(Exception):  # Dragon raises errors of many kinds
                    process.join()
        self._free_group()

    def _free_group(self) -> None:
        """Free the resources of a job with a PMI."""
        if self._group is not None:
            with suppress(Exception):  # Dragon raises errors of many kinds; the ranks' results are known
                self._group.close()
            shutil.rmtree(self._shared_memory_folder, ignore_errors=True)

    def _find_pmi(self) -> str:
        """Find the PMI of the ranks. Return why there is none; empty if there is one, or if the task needs none."""
        wanted = self.task_run.spec.layout.pmi
        if wanted is None or wanted == "none" or self._in_step:
            return ""
        answer = self.node.pmi_prober.find(wanted)
        futures: list[Future[Any]] = [answer, self._stop_requested]
        wait(futures, return_when=FIRST_COMPLETED)
        if self._stop_requested.done():
            return ""
        self._pmi = answer.result().pmi
        return answer.result().problem

    def _template_error(self, template: Template) -> str:
        """Return which device of this template the node lacks; empty if it has all."""
        if missing := [gpu for gpu in template.gpu_affinity if gpu >= self.node.gpus]:
            return f"GPU {missing[0]} was asked for; {socket.gethostname()} has {self.node.gpus or 'no'} GPUs."
        usable = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(self.node.cores))
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

    def _launch(self) -> None:
        if self._in_step or self._pmi is not None:
            self._launch_group(self._pmi)
            return
        for rank in self._ranks:
            process = self._process(rank)
            with self._lock:
                if self._stop_cause is not None or self._failed_rank is not None:
                    return
                process.launch(self._launcher)
                self._processes[rank] = process

    def _launch_group(self, pmi: PmiName | None) -> None:
        """Start all ranks under one PMI, or without one let a step of the scheduler start them.

        This takes seconds; the node agent's main thread continues meanwhile. Dragon 0.15 has hung here about once in
        100 starts; therefore a second attempt follows a timeout.
        """
        shared = rank_environment(self._shared_memory_folder)

        def start() -> tuple[list[SupervisedProcess], ProcessGroup]:
            processes = [self._process(rank) for rank in self._ranks]
            programs = [process.program._replace(env={**shared, **process.program.env}) for process in processes]
            if pmi is not None:
                return processes, self.node.launcher.launch_group(programs, pmi)
            return processes, StepGroup(programs, self._report_prepared)

        processes, self._group = call_with_timeouts(start, _GROUP_START_S, undo=lambda late: _end_group(late[1]))
        for process, launched in zip(processes, self._group.ranks, strict=True):
            process.process = launched
        with self._lock:
            self._processes = dict(zip(self._ranks, processes, strict=True))
            if self._stop_cause is not None or self._failed_rank is not None:
                _stop_all(processes)

    def _report_prepared(self, scripts: list[str]) -> None:
        self.node.report_prepared(RanksPrepared(self.uid, dict(zip(self._ranks, scripts, strict=True))))

    def end_step(self, problem: str) -> None:
        """Let the ranks end that the step of the scheduler has not started."""
        group = self._group
        if isinstance(group, StepGroup):
            for process in self.processes():
                process.kill_reason = process.kill_reason or f"was not started: {problem or 'its step has ended'}"
            group.end_unstarted()

    @property
    def _shared_memory_folder(self) -> Path:
        """The folder for the memory that the MPI library shares between the ranks."""
        return Path(self.node.config.folder, f"mpi-{self.uid}")

    def _process(self, rank: int) -> SupervisedProcess:
        task_run, layout, config = self.task_run, self.task_run.spec.layout, self.node.config
        template, work, caps = self._templates[rank], task_run.spec.work, config.caps
        process = SupervisedProcess(self.node, template)
        if isinstance(work, Command) and not self._software.needs_rank and self._has_short_json_arguments(work):
            arguments = arguments_of(work, task_run.bindings, load_json)
        else:
            arguments = self._software.rank_command(process.path)
        devices = self._devices.get(rank, Devices())
        needs = layout.needs
        env: dict[str, str | None] = {
            **device_variables(int(needs.cores or 0), devices.gpus if needs.gpus else None, os.environ),
            "RHAPSODY_RANK": str(rank),
            "RHAPSODY_RANKS": str(layout.ranks),
            "RHAPSODY_NODES": ",".join(self._nodes),
            PROGRESS_VARIABLE: process.progress.path,
            **({} if task_run.variables.keys() & template.env.keys() else task_run.variables),
        }
        if isinstance(work, Command):
            env |= _SEEN_AT_ONCE
        if self._launcher.sets_affinity and template.gpu_affinity:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, template.gpu_affinity))
        arguments, env = self._software.around(arguments, process.path, env, template)
        process.write_plan(
            ProcessPlan(
                arguments,
                config.cwd,
                template.cwd or "",
                env,
                devices.cpus or (template.cpu_affinity if self._launcher.sets_affinity else ()),
                caps.output_bytes,
                (task_run.results_folder, self.uid, task_run.attempt),
                self.node.start_events,
            )
        )
        return process

    def _has_short_json_arguments(self, work: Command) -> bool:
        """Return whether all arguments are text or short JSON: the node agent may neither unpickle user data nor read
        long files."""
        parts = chain.from_iterable(map(parts_of, work.arguments))
        used = (self.task_run.bindings[part.uid] for part in parts if isinstance(part, Ref))
        return all(value.format == "json" and value.file is None for value in used)

    def _join(self) -> dict[int, int]:
        """Wait for all ranks; return their exit codes, by rank."""
        if self._group is None:
            return {rank: process.join() for rank, process in self._processes.items()}
        with ThreadPoolExecutor(len(self._processes)) as waiting:
            return dict(zip(self._processes, waiting.map(self._join_rank, self._processes), strict=True))

    def _join_rank(self, rank: int) -> int:
        """Wait for a rank. If it failed, end the other ranks, which might wait for it for ever."""
        code = self._processes[rank].join()
        end = self._collect_rank_end(rank)
        with self._lock:
            self._ended_ranks.add(rank)
        if end is None or end.outcome.cause is not None:
            self.fail(rank)
        return code

    def _collect_rank_end(self, rank: int) -> RankEnd | None:
        """Collect the end of a rank that has ended; None if its supervisor was killed."""
        if rank not in self._rank_ends:
            process, max_bytes = self._processes[rank], self.node.config.caps.output_bytes
            process.progress.final()
            try:
                self._rank_ends[rank] = rank_end(process.path, self.task_run, rank, max_bytes)
            except OSError as error:
                lost = RankOutcome(rank, cause=Cause.ERROR, error=f"what it printed could not be kept: {error}")
                self._rank_ends[rank] = RankEnd(lost, None, time.time())
        return self._rank_ends[rank]

    def _final_rank_end(self, rank: int, code: int) -> RankEnd:
        end = self._collect_rank_end(rank)
        if end is None:
            process, max_bytes = self._processes[rank], self.node.config.caps.output_bytes
            stdout, stderr = take_output(process.path, self.task_run.results_folder, max_bytes)
            outcome = RankOutcome(
                rank,
                exit_code=code,
                stdout=stdout,
                stderr=stderr,
                cause=Cause.MEMORY if process.exceeded_memory else Cause.CRASHED,
                error=f"its process {process.kill_reason or how_it_ended(code)}.",
            )
            end = RankEnd(outcome, None, time.time())
        if rank not in self._ranks_ended_with_failed or end.outcome.cause is None:
            return end
        outcome = msgspec.structs.replace(end.outcome, cause=Cause.CANCELED, error=self._ended_with_failed)
        return end._replace(outcome=outcome)

    def _not_started(self, rank: int) -> RankEnd:
        """Return the end of a rank that was not started, because a rank on another node had failed."""
        outcome = RankOutcome(rank, socket.gethostname(), cause=Cause.CANCELED, error=self._ended_with_failed)
        return RankEnd(outcome, None, time.time())

    @property
    def _ended_with_failed(self) -> str:
        return f"ended because rank {self._failed_rank} failed"

    def _outcome(self, ends: list[RankEnd]) -> Outcome:
        """Return the outcome of the ranks: DONE if none failed. Value and output are those of the first rank; the exit
        code is that of the first failed rank, else of the first rank."""
        ranks = [end.outcome for end in ends]
        failed = [rank for rank in ranks if rank.cause is not None]
        failed.sort(key=lambda rank: rank.rank != self._failed_rank)  # the rank that failed first, if it is known
        spec = self.task_run.spec
        state, cause, error, trace = TaskState.DONE, None, "", ""
        if self._stop_cause is not None:
            state = TaskState.CANCELED if self._stop_cause is Cause.CANCELED else TaskState.FAILED
            cause, error = self._stop_cause, why_stopped(self._stop_cause, spec.timeout_s)
        elif failed:
            where = f"rank {failed[0].rank} of {spec.layout.ranks}: " if spec.layout.mode == "job" else ""
            state, cause, error, trace = TaskState.FAILED, failed[0].cause, where + failed[0].error, failed[0].traceback
        first = ranks[0] if ranks else RankOutcome(0)
        result = FunctionResult(first.value)
        if state is TaskState.DONE and first.rank == 0:
            result = self._with_outputs(result)
            state, cause, error = (state, None, "") if result.cause is None else _failure(result)
        return Outcome(
            state=state,
            started=min((end.started for end in ends if end.started is not None), default=self.started_at),
            ended=max((end.ended for end in ends), default=time.time()),
            value=result.value if state is TaskState.DONE else None,
            stdout=first.stdout,
            stderr=first.stderr,
            exit_code=(failed[0] if failed else first).exit_code,
            cause=cause,
            error=error,
            traceback=trace,
            exception=failed[0].exception if failed and self._stop_cause is None else b"",
            ranks=tuple(ranks) if spec.layout.mode == "job" else (),
            notes=(*self._notes(ends), *result.notes),
            progress=self._progress(),
            measured=self._measured(ends),
        )

    def _measured(self, ends: list[RankEnd]) -> Measured | None:
        peaks = [process.peak_memory_bytes for process in self._processes.values()]
        peak = max([*peaks, *(end.peak_memory_bytes for end in ends)], default=0)
        seen = {rank: process.cpu_s for rank, process in self._processes.items()}  # of a rank that was killed
        return Measured(sum(end.cpu_s or seen.get(end.outcome.rank, 0.0) for end in ends), peak) if peak else None

    def _progress(self) -> Progress | None:
        """What the first rank that has told anything has told."""
        told = (self._processes[rank].progress.progress for rank in sorted(self._processes))
        return next((progress for progress in told if progress is not None), None)

    def advanced(self) -> list[TaskProgressed]:
        """Read the progress of the ranks; return what is new."""
        with self._lock:
            processes = dict(self._processes)
        return [
            TaskProgressed(self.uid, rank, process.progress.progress)
            for rank, process in processes.items()
            if process.progress.advance() and process.progress.progress is not None
        ]

    def printed(self, query: OutputQuery) -> Printed | None:
        """Return a piece of what a rank has printed so far; None if the rank does not run here."""
        with self._lock:
            process = self._processes.get(query.rank)
        return read_printed(process.path, query, self.node.config.caps.output_bytes) if process else None

    def _with_outputs(self, result: FunctionResult) -> FunctionResult:
        """Return the result of rank 0 with the files in its working directory that the task gives out."""
        task_run, config = self.task_run, self.node.config
        work = task_run.spec.work
        patterns = () if isinstance(work, Completion) else work.outputs
        cwd = os.path.join(config.cwd, self._templates[0].cwd or "")
        max_bytes = config.caps.result_bytes
        return with_outputs(result, patterns, cwd, task_run.results_folder, max_bytes, self.started_at)

    def _notes(self, ends: list[RankEnd]) -> tuple[str, ...]:
        ranks, notes = len(ends), [*left_out(*(end.outcome for end in ends))]
        left_running = sum(end.left_running for end in ends if end.outcome.rank not in self._ranks_ended_with_failed)
        if left_running and self._stop_cause is None:
            notes.append(stopped_note(left_running))
        if any(end.mpi_alone for end in ends) or may_use_mpi(self.task_run.spec, self.node.config.cwd):
            notes.append(_MPI_ALONE)
        if ranks > self.node.cores:
            notes.append(f"oversubscribed: {ranks} ranks shared {self.node.cores} cores")
        if self.task_run.spec.layout.pmi == "none":
            notes.append(f'pmi "none": {ranks} independent ranks, no MPI between them')
        return tuple(notes)


_SEEN_AT_ONCE = {} if "PYTHONUNBUFFERED" in os.environ else {"PYTHONUNBUFFERED": "1"}
"""Variables for programs: what a Python program prints is else not seen before it has printed 8 KB."""
_MPI_ALONE = (
    "its ranks seem to use MPI, and were started without: each is alone, of a world of size 1. For MPI between them "
    "submit it with mpi: true"
)
_GROUP_START_S = (60.0, 120.0)


def _failure(result: FunctionResult) -> tuple[TaskState, Cause | None, str]:
    return TaskState.FAILED, result.cause, result.error


def _end_group(group: ProcessGroup) -> None:
    for rank in group.ranks:
        rank.terminate()
    with suppress(Exception):  # Dragon raises errors of many kinds
        group.close()


def _stop_all(processes: Iterable[SupervisedProcess]) -> None:
    """Start to end the processes, and return at once."""
    for process in processes:
        threading.Thread(target=process.stop, daemon=True).start()
