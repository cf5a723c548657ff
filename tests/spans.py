"""Spans and metrics of tests, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

__all__ = ["Spans", "kept_metrics", "kept_spans"]

_EXPORTER = InMemorySpanExporter()
_PROVIDER = TracerProvider()
"""One for all tests of a process: the MCP SDK keeps the first."""
_PROVIDER.add_span_processor(SimpleSpanProcessor(_EXPORTER))


class Spans:
    """What has ended since this was made."""

    tracer = _PROVIDER.get_tracer("tests")
    task_tracer = _PROVIDER.get_tracer("rhapsody_mcp.tasks")

    def all(self) -> list[ReadableSpan]:
        return list(_EXPORTER.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        """The only span with this name."""
        (span,) = [span for span in self.all() if span.name == name]
        return span

    def id_of(self, span: ReadableSpan) -> int:
        context = span.get_span_context()
        assert context is not None
        return context.span_id

    def below(self, span: ReadableSpan) -> list[ReadableSpan]:
        """The children, by start and then in the order of their ends."""
        own = self.id_of(span)
        children = [child for child in self.all() if child.parent and child.parent.span_id == own]
        return sorted(children, key=lambda child: child.start_time or 0)

    def tree(self, span: ReadableSpan) -> dict[str, Any]:
        """The names of the spans below, as a dict of dicts."""
        return {child.name: self.tree(child) for child in self.below(span)}


@contextmanager
def kept_spans() -> Iterator[Spans]:
    """Within the block, a tracer provider is set, as a program or a server sets one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trace, "_TRACER_PROVIDER", _PROVIDER)
        _EXPORTER.clear()
        yield Spans()


@contextmanager
def kept_metrics() -> Iterator[InMemoryMetricReader]:
    """Within the block, a meter provider is set."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics._internal, "_METER_PROVIDER", provider)
        yield reader
    provider.shutdown()
