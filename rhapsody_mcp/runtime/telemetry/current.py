"""The ids of the current span, for what is logged."""

from __future__ import annotations

from opentelemetry.trace import format_span_id, format_trace_id, get_current_span

__all__ = ["current_ids"]


def current_ids() -> dict[str, str]:
    """`trace_id` and `span_id` in hexadecimal, as every tool shows them; empty where no span is current."""
    span = get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    return {"trace_id": format_trace_id(span.trace_id), "span_id": format_span_id(span.span_id)}
