"""The outcomes that a compute backend itself gives to tasks."""

from __future__ import annotations

import time

import msgspec

from rhapsody_mcp.backends.compute.in_flight import InFlightTask
from rhapsody_mcp.engine.messages import FunctionFinished, WorkerExited
from rhapsody_mcp.engine.task.output import left_out, stopped_note, with_printed
from rhapsody_mcp.engine.task.rank_result import how_it_ended
from rhapsody_mcp.model.outcome import Measured, Outcome, RankOutcome, failed, why_stopped
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream

__all__ = ["crashed", "finished", "lost", "refused", "stopped"]

_NO_OUTPUT = (Stream(), Stream())


def finished(task: InFlightTask, message: FunctionFinished) -> Outcome:
    """The outcome of a function that has ended in its worker."""
    result = message.result
    if message.interrupted and task.stop_cause is not None:
        outcome = stopped(task, (message.stdout, message.stderr), message.started)
        return msgspec.structs.replace(outcome, progress=message.progress, worker=task.worker_number)
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
        notes=(
            *result.notes,
            *left_out(message),
            *([stopped_note(message.left_running)] if message.left_running else ()),
        ),
        progress=message.progress,
        measured=Measured(message.cpu_s) if message.cpu_s else None,
        worker=task.worker_number,
    )


def stopped(task: InFlightTask, output: tuple[Stream, Stream] = _NO_OUTPUT, started: float | None = None) -> Outcome:
    """The outcome of a task that was canceled or reached its time limit; `output` is stdout and stderr."""
    cause = task.stop_cause or Cause.CANCELED
    outcome = Outcome(
        state=TaskState.FAILED if cause is Cause.TIMEOUT else TaskState.CANCELED,
        started=started or task.started,
        ended=time.time(),
        cause=cause,
        error=why_stopped(cause, task.task_run.spec.timeout_s),
    )
    return with_printed(_with_output(outcome, output), _printed(task))


def crashed(task: InFlightTask, exited: WorkerExited, output: tuple[Stream, Stream]) -> Outcome:
    """The outcome of a function whose worker exited before the function returned."""
    message = f"its process {exited.why or how_it_ended(exited.exit_code)} before the function returned."
    return _with_output(failed(Cause.CRASHED, message, started=task.started, exit_code=exited.exit_code), output)


def lost(task: InFlightTask, reason: str) -> Outcome:
    """The outcome of a task whose engine or node ended, or is not there."""
    return with_printed(failed(Cause.LOST, reason, started=task.started), _printed(task))


def _printed(task: InFlightTask) -> tuple[RankOutcome, ...]:
    return getattr(task, "printed", ())


def refused(message: str) -> Outcome:
    """The outcome of a task that cannot run on this engine."""
    return failed(Cause.INVALID, message)


def _with_output(outcome: Outcome, output: tuple[Stream, Stream]) -> Outcome:
    with_output = msgspec.structs.replace(outcome, stdout=output[0], stderr=output[1])
    return msgspec.structs.replace(with_output, notes=tuple(left_out(with_output)))
