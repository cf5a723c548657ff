"""The telemetry of a session: spans and metrics, each where a provider of OpenTelemetry is set in this process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from opentelemetry.metrics import get_meter_provider
from opentelemetry.trace import NoOpTracer, ProxyTracerProvider, get_tracer_provider

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.runtime.telemetry.task_metrics import SessionMetrics, task_metrics
from rhapsody_mcp.runtime.telemetry.task_spans import TaskSpans

__all__ = ["Telemetry", "configured_telemetry"]

_log = logging.getLogger(__name__)


class Telemetry:
    """What a session tells of its tasks. Where that raises, as a processor of a user may, it ends, and the tasks go
    on."""

    def __init__(self, spans: TaskSpans | None, metrics: SessionMetrics | None) -> None:
        self._spans, self._metrics = spans, metrics

    def note_change(self, task: Task) -> None:
        """The state of the task has changed."""
        with self._guarded():
            if self._spans is not None:
                self._spans.note_change(task)
            if self._metrics is not None:
                self._metrics.note_change(task)

    def traced(self, task: Task, task_run: TaskRun) -> TaskRun:
        """The task run with the trace context of its execution in its variables."""
        with self._guarded():
            if self._spans is not None:
                return self._spans.traced(task, task_run)
        return task_run

    def end_attempt(self, task: Task, outcome: Outcome) -> None:
        """An attempt of the task has failed, and another follows."""
        with self._guarded():
            if self._spans is not None:
                self._spans.end_attempt(task, outcome)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """What is submitted within the block was submitted in a previous run."""
        with nullcontext() if self._spans is None else self._spans.restoring():
            yield

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            _log.exception("the telemetry of a session ends here; its tasks go on")
            self._spans = self._metrics = None


def configured_telemetry(session: str) -> Telemetry | None:
    """The telemetry of a session with this id; None where no provider is set yet."""
    spans, metrics = _spans(session), _metrics()
    return None if spans is None and metrics is None else Telemetry(spans, metrics)


def _spans(session: str) -> TaskSpans | None:
    if isinstance(provider := get_tracer_provider(), ProxyTracerProvider):
        return None
    tracer = provider.get_tracer("rhapsody_mcp.tasks")
    return None if isinstance(tracer, NoOpTracer) else TaskSpans(session, tracer)


def _metrics() -> SessionMetrics | None:
    """The API has no public name for the provider that stands for none: a real one is of the SDK."""
    sdk, provider = sys.modules.get("opentelemetry.sdk.metrics"), get_meter_provider()
    if sdk is None or not isinstance(provider, sdk.MeterProvider):
        return None
    return SessionMetrics(task_metrics(provider))
