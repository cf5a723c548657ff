"""Ids of spans that are known before the spans begin."""

from __future__ import annotations

import threading
from typing import Any, Protocol, cast

from opentelemetry.trace import Tracer

__all__ = ["SpanIds", "span_ids"]


class _IdGenerator(Protocol):
    def generate_span_id(self) -> int:
        """A new id."""


class SpanIds(threading.local):
    """The ids of a tracer, in the place of its id generator. `given` is the id of the next span of this thread."""

    given: int | None = None

    def __init__(self, generator: _IdGenerator) -> None:
        self._generator = generator

    def generate_span_id(self) -> int:
        given, self.given = self.given, None
        return given or self._generator.generate_span_id()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


def span_ids(tracer: Tracer) -> SpanIds | None:
    """The ids of a tracer that nobody else uses; None where it is none of OpenTelemetry's own SDK."""
    if (generator := getattr(tracer, "id_generator", None)) is None:
        return None
    if not isinstance(generator, SpanIds):
        generator = SpanIds(generator)
        cast(Any, tracer).id_generator = generator
    return generator
