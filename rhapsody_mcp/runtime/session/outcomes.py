"""Outcomes that a session makes, and results that it opens for the user of a task."""

from __future__ import annotations

import pickle

from msgspec.structs import replace

from rhapsody_mcp.model.outcome import Outcome, canceled
from rhapsody_mcp.model.specs import Software
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader, Stream
from rhapsody_mcp.runtime.tasks import Task, name_of, rank_of

__all__ = ["canceled_by_upstream", "open_results", "with_attempts", "with_progress"]

_UPSTREAM_CHARS = 300


def canceled_by_upstream(source: Task) -> Outcome:
    """The outcome of a task whose `source` did not end DONE. In a chain of such tasks the error names the first."""
    assert source.outcome is not None
    error = source.outcome.error
    if source.outcome.cause is Cause.SKIPPED:
        is_first = source.when is not None and error.startswith("its condition")
        return canceled(Cause.SKIPPED, f"{name_of(source)} was skipped: {error}" if is_first else error)
    if source.outcome.cause is Cause.UPSTREAM:
        return canceled(Cause.UPSTREAM, error)
    shown = error if len(error) <= _UPSTREAM_CHARS else f"{error[:_UPSTREAM_CHARS]} [...]"
    return canceled(Cause.UPSTREAM, f"{name_of(source)} did not end DONE: {shown}")


def with_attempts(task: Task, outcome: Outcome) -> Outcome:
    """The outcome with a note such as `attempt 3 of 3, no retry is left; attempt 2 ended with cause error: ...`. The
    error says that retries are used up."""
    if not task.last_failure or outcome.cause in (Cause.UPSTREAM, Cause.SKIPPED):
        return outcome
    used_up = outcome.state is TaskState.FAILED and task.attempts >= task.most_attempts
    left = ", no retry is left" if used_up else ""
    error = outcome.error
    if used_up and task.retries:
        retries = "its retry is" if task.retries == 1 else f"its {task.retries} retries are"
        error += f" (failed {task.attempts} times, {retries} used up)"
    note = f"attempt {task.attempts} of {max(task.attempts, task.most_attempts)}{left}; {task.last_failure}"
    return replace(outcome, error=error, notes=(*outcome.notes, note))


def with_progress(task: Task, outcome: Outcome) -> Outcome:
    """The outcome with what the task has told last; the task shows the same from now on."""
    if outcome.progress is not None:
        task.progress = outcome.progress
    return replace(outcome, progress=task.progress) if task.progress is not None else outcome


def open_results(task: Task, outcome: Outcome, read: Reader, software: Software) -> Outcome:
    """Set value, output, ranks and exception of the task. Unpickling runs user code.

    Returns the outcome; it is FAILED where the result cannot be opened in this process. Of a result that another Python
    has made, only a note says that: tasks in that Python can use it.
    """
    task.stdout, task.stderr = _read(outcome.stdout), _read(outcome.stderr)
    if outcome.exception:
        task.raised = _load_exception(outcome.exception)
    try:
        if outcome.ranks:
            task.ranks = tuple(rank_of(rank, read) for rank in outcome.ranks)
        if outcome.value is not None:
            task.return_value = read(outcome.value)
    except (Exception, SystemExit) as error:
        message = f"its result cannot be opened here: {type(error).__name__}: {error}"
        if software.python or software.container:
            return replace(outcome, notes=(*outcome.notes, f"return_value is None, as {message}"))
        return Outcome(state=TaskState.FAILED, ended=outcome.ended, cause=Cause.ERROR, error=message)
    return outcome


def _read(stream: Stream) -> str:
    """The output; of a long one whose file is gone, its end."""
    try:
        return stream.read()
    except OSError:
        return stream.text


def _load_exception(data: bytes) -> BaseException | None:
    """The exception, or None where it cannot be unpickled in this process."""
    try:
        error = pickle.loads(data)
    except (Exception, SystemExit):
        return None
    return error if isinstance(error, BaseException) else None
