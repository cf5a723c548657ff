"""Outcomes that a session gives to tasks, and results opened for the user of a task."""

from __future__ import annotations

import pickle
import time

from msgspec.structs import replace

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader
from rhapsody_mcp.runtime.tasks import Task, name_of, rank_of

__all__ = ["canceled", "canceled_by_upstream", "failed", "open_results", "with_attempts"]

_UPSTREAM_CHARS = 300


def canceled(cause: Cause, message: str) -> Outcome:
    return Outcome(state=TaskState.CANCELED, ended=time.time(), cause=cause, error=message)


def failed(cause: Cause, message: str) -> Outcome:
    return Outcome(state=TaskState.FAILED, ended=time.time(), cause=cause, error=message)


def canceled_by_upstream(source: Task) -> Outcome:
    """The outcome of a task that waited for `source`, which did not end DONE. A chain of such tasks names its first."""
    assert source.outcome is not None
    error = source.outcome.error
    if source.outcome.cause is Cause.UPSTREAM:
        return canceled(Cause.UPSTREAM, error)
    shown = error if len(error) <= _UPSTREAM_CHARS else f"{error[:_UPSTREAM_CHARS]} [...]"
    return canceled(Cause.UPSTREAM, f"{name_of(source)} did not end DONE: {shown}")


def with_attempts(task: Task, outcome: Outcome) -> Outcome:
    """With a note such as `attempt 3 of 3, no retry is left; attempt 2 ended with cause error: ...`."""
    if not task.last_failure:
        return outcome
    used_up = outcome.state is TaskState.FAILED and task.attempts > task.retries
    left = ", no retry is left" if used_up else ""
    note = f"attempt {task.attempts} of {max(task.attempts, task.retries + 1)}{left}; {task.last_failure}"
    return replace(outcome, notes=(*outcome.notes, note))


def open_results(task: Task, outcome: Outcome, read: Reader) -> Outcome:
    """Give the task what its user sees: value, output, ranks and exception. Runs the user's own code (pickle).

    A result that cannot be opened here makes the outcome FAILED.
    """
    task.stdout, task.stderr = outcome.stdout.read(), outcome.stderr.read()
    if outcome.exception:
        task.raised = _load_exception(outcome.exception)
    try:
        if outcome.ranks:
            task.ranks = tuple(rank_of(rank, read) for rank in outcome.ranks)
        if outcome.value is not None:
            task.return_value = read(outcome.value)
    except (Exception, SystemExit) as error:
        message = f"its result cannot be opened here: {type(error).__name__}: {error}"
        return Outcome(state=TaskState.FAILED, ended=outcome.ended, cause=Cause.ERROR, error=message)
    return outcome


def _load_exception(data: bytes) -> BaseException | None:
    """None where the exception's class, or what the exception holds, is not to be had here."""
    try:
        error = pickle.loads(data)
    except (Exception, SystemExit):
        return None
    return error if isinstance(error, BaseException) else None
