"""The spans of the tasks of a session."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from msgspec.structs import replace
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.redaction import redacted
from rhapsody_mcp.runtime.tasks import AITask, Task, kind_of, name_of
from rhapsody_mcp.runtime.telemetry.span_ids import span_ids

__all__ = ["TaskSpans"]

_FIRST, _ONE_OF = 1000, 100
_MAX_CALLS = 1000
_MAX_RANKS = 32
_ERROR_CHARS = 500
_W3C = TraceContextTextMapPropagator()
Attributes = Mapping[str, str | int | tuple[str, ...]]


class _Call:
    """What tasks are submitted in: the span of a tool call, or another that is current then."""

    def __init__(self, span_context: SpanContext, **attributes: bool) -> None:
        self.context = _context_of(span_context)
        self.attributes = attributes
        self._tasks, self._failures = itertools.count(1), itertools.count(1)
        self.unsampled_variables = _variables(_with(span_context, span_context.span_id, TraceFlags()))

    def samples_next(self) -> bool:
        """Whether the next task that is submitted has spans."""
        return _is_sampled(next(self._tasks))

    def samples_failure(self) -> bool:
        """Whether the next of the other tasks that has failed has spans nevertheless."""
        return _is_sampled(next(self._failures))


def _is_sampled(number: int) -> bool:
    return number <= _FIRST or number % _ONE_OF == 0


class _TaskSpan:
    """The span of a task that has not ended. `since` is the time from which the task waits, `execution_id` the id that
    the span of the current attempt will have."""

    __slots__ = ("call", "execution_id", "inputs_ready", "since", "span")

    def __init__(self, call: _Call, span: Span, since: int) -> None:
        self.call, self.span, self.since = call, span, since
        self.inputs_ready: int | None = None
        self.execution_id: int | None = None

    @property
    def context(self) -> Context:
        return set_span_in_context(self.span, Context())


class TaskSpans:
    """Makes a span for each task, below the span that is current when the task is submitted; that of a task of a
    for_each is below the one of the for_each. Its children are `submission`, and for each attempt `queue` and
    `execution`, below which stands a span for each rank of a job. Times are those of the task; ranks, which start
    together and end together, have those of their job.

    Of the tasks of one call, the first 1,000 have spans, and then one of each 100. Of the others, those that end FAILED
    have spans by the same rule: the first 1,000, and then one of each 100. Tasks that are submitted while no span is
    current count as one call for each session, and so do those that are restored after a restart, each of which has a
    trace of its own. Of a job, the first 32 ranks have spans, and 32 more that failed.
    """

    def __init__(self, session: str, tracer: Tracer) -> None:
        self._session, self._tracer, self._ids = session, tracer, span_ids(tracer)
        self._open: dict[str, _TaskSpan] = {}
        self._unsampled: dict[str, _Call] = {}
        self._calls: dict[tuple[int, int], _Call] = {}
        self._restoration: _Call | None = None

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """What is submitted within the block was submitted in a previous run."""
        self._restoration = _Call(get_current_span(Context()).get_span_context(), **{"rhapsody.task.restored": True})
        try:
            yield
        finally:
            self._restoration = None

    def note_change(self, task: Task) -> None:
        """The state of the task has changed."""
        if task.state.final:
            self._end(task)
        elif (task_span := self._open.get(task.uid)) is not None:
            if task.state is TaskState.QUEUED and task_span.inputs_ready is None:
                task_span.inputs_ready = time.time_ns()
        elif task.uid not in self._unsampled:
            self._begin(task)

    # --- submission

    def _begin(self, task: Task) -> None:
        parent = task.parent
        if parent is not None and not parent.state.final and self._call_of(parent) is None:
            self._begin(parent)
        call = (self._call_of(parent) if parent is not None else None) or self._current_call()
        if not call.samples_next():
            self._unsampled[task.uid] = call
            return
        now = time.time_ns()
        submitted = now if call is self._restoration else min(_ns(task.submitted or 0.0) or now, now)
        self._open[task.uid] = task_span = self._start(task, call, submitted)
        self._child(task_span, "submission", submitted, now)
        task_span.since = now

    def _call_of(self, task: Task) -> _Call | None:
        task_span = self._open.get(task.uid)
        return self._unsampled.get(task.uid) if task_span is None else task_span.call

    def _current_call(self) -> _Call:
        if self._restoration is not None:
            return self._restoration
        span_context = get_current_span().get_span_context()
        key = (span_context.trace_id, span_context.span_id)
        if (call := self._calls.get(key)) is None:
            call = self._calls[key] = _Call(span_context)
            if len(self._calls) > _MAX_CALLS:
                del self._calls[next(iter(self._calls))]
        return call

    def _start(self, task: Task, call: _Call, submitted: int) -> _TaskSpan:
        parent = None if task.parent is None else self._open.get(task.parent.uid)
        context = call.context if parent is None else parent.context
        attributes = {**self._attributes(task), **call.attributes}
        span = self._tracer.start_span(f"task {name_of(task)}", context, attributes=attributes, start_time=submitted)
        return _TaskSpan(call, span, submitted)

    def _attributes(self, task: Task) -> dict[str, str | int]:
        attributes: dict[str, str | int] = {
            "rhapsody.session.id": self._session,
            "rhapsody.task.id": task.uid,
            "rhapsody.task.kind": kind_of(task),
        }
        if task.name:
            attributes["rhapsody.task.name"] = task.name
        if task.backend:
            attributes["rhapsody.backend.name"] = task.backend
        if isinstance(task, AITask):
            attributes["gen_ai.operation.name"] = "chat"
            if task.what:
                attributes["gen_ai.request.model"] = task.what
        return attributes

    def _child(
        self, task_span: _TaskSpan, name: str, start: int, end: int, attributes: Attributes | None = None
    ) -> None:
        self._tracer.start_span(name, task_span.context, attributes=attributes, start_time=start).end(end)

    # --- execution

    def traced(self, task: Task, task_run: TaskRun) -> TaskRun:
        """The task run with the trace context of its execution in its variables."""
        if (task_span := self._open.get(task.uid)) is not None:
            variables = self._variables_of(task_span)
        elif (call := self._unsampled.get(task.uid)) is not None:
            variables = call.unsampled_variables
        else:
            return task_run
        return replace(task_run, variables=variables) if variables else task_run

    def _variables_of(self, task_span: _TaskSpan) -> dict[str, str]:
        span_context = task_span.span.get_span_context()
        if self._ids is None or not task_span.span.is_recording():
            return _variables(span_context)
        task_span.execution_id = self._ids.generate_span_id()
        return _variables(_with(span_context, task_span.execution_id, span_context.trace_flags))

    def end_attempt(self, task: Task, outcome: Outcome) -> None:
        """An attempt of the task has failed, and another follows."""
        if (task_span := self._open.get(task.uid)) is not None:
            self._add_attempt(task_span, task, outcome)

    def _end(self, task: Task) -> None:
        task_span, outcome = self._open.pop(task.uid, None), task.outcome
        if task_span is None:
            call = self._unsampled.pop(task.uid, None)
            if call is None or task.state is not TaskState.FAILED or not call.samples_failure():
                return
            task_span = self._start(task, call, _ns(task.submitted or 0.0))
        assert outcome is not None, "an ended task has one"
        ended = self._add_attempt(task_span, task, outcome)
        task_span.span.set_attributes(_end_attributes(task, outcome))
        _set_status(task_span.span, outcome.state, outcome.error)
        task_span.span.end(ended)

    def _add_attempt(self, task_span: _TaskSpan, task: Task, outcome: Outcome) -> int:
        """Add the spans of an attempt that has ended; the result is its end."""
        waited_from, ended = task_span.since, max(_ns(outcome.ended), task_span.since)
        started = ended if outcome.started is None else min(max(_ns(outcome.started), waited_from), ended)
        task_span.since = ended
        if not task_span.span.is_recording():
            return ended
        queue = self._tracer.start_span("queue", task_span.context, start_time=waited_from)
        if task_span.inputs_ready is not None and waited_from <= task_span.inputs_ready <= started:
            queue.add_event("inputs are there", timestamp=task_span.inputs_ready)
        queue.end(started)
        if outcome.started is not None:
            self._add_execution(task_span, task, outcome, started, ended)
        return ended

    def _add_execution(self, task_span: _TaskSpan, task: Task, outcome: Outcome, started: int, ended: int) -> None:
        if self._ids is not None:
            self._ids.given, task_span.execution_id = task_span.execution_id, None
        attributes: dict[str, str | int | tuple[str, ...]] = {"rhapsody.task.attempt": max(1, task.attempts)}
        if outcome.nodes:
            attributes["rhapsody.task.nodes"] = outcome.nodes
        if outcome.exit_code is not None:
            attributes["process.exit.code"] = outcome.exit_code
        span = self._tracer.start_span("execution", task_span.context, attributes=attributes, start_time=started)
        _set_status(span, outcome.state, outcome.error)
        failed = [rank for rank in outcome.ranks[_MAX_RANKS:] if rank.cause is not None]
        for rank in (*outcome.ranks[:_MAX_RANKS], *failed[:_MAX_RANKS]):
            self._add_rank(span, rank, started, ended)
        span.end(ended)

    def _add_rank(self, execution: Span, rank: RankOutcome, started: int, ended: int) -> None:
        attributes: dict[str, str | int] = {"rhapsody.rank": rank.rank, "host.name": rank.host, "process.pid": rank.pid}
        if rank.exit_code is not None:
            attributes["process.exit.code"] = rank.exit_code
        context = set_span_in_context(execution, Context())
        span = self._tracer.start_span(f"rank {rank.rank}", context, attributes=attributes, start_time=started)
        if rank.cause is not None:
            span.set_attribute("error.type", rank.cause.value)
            _set_status(span, TaskState.FAILED, rank.error)
        span.end(ended)


def _end_attributes(task: Task, outcome: Outcome) -> Attributes:
    attributes: dict[str, str | int | tuple[str, ...]] = {
        "rhapsody.task.state": task.counted_as,
        "rhapsody.task.attempts": task.attempts,
    }
    if task.backend:
        attributes["rhapsody.backend.name"] = task.backend
    if outcome.cause is not None:
        attributes["rhapsody.task.cause"] = outcome.cause.value
        if outcome.state is TaskState.FAILED:
            attributes["error.type"] = outcome.cause.value
    if outcome.nodes:
        attributes["rhapsody.task.nodes"] = outcome.nodes
    if outcome.ranks:
        attributes["rhapsody.task.ranks"] = len(outcome.ranks)
    if outcome.usage is not None:
        attributes["gen_ai.usage.input_tokens"] = outcome.usage.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = outcome.usage.completion_tokens
    return attributes


def _set_status(span: Span, state: TaskState, error: str) -> None:
    if state is TaskState.FAILED:
        first_line = error.strip().partition("\n")[0][:_ERROR_CHARS]
        span.set_status(Status(StatusCode.ERROR, redacted(first_line)))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _with(span_context: SpanContext, span_id: int, flags: TraceFlags) -> SpanContext:
    return SpanContext(span_context.trace_id, span_id, False, flags, span_context.trace_state)


def _context_of(span_context: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(span_context), Context())


def _variables(span_context: SpanContext) -> dict[str, str]:
    """The trace context as environment variables; empty where there is none."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, _context_of(span_context))
    return {name.upper(): value for name, value in carrier.items()}
