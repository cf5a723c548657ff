"""The task stream as a trace in Chrome's trace event format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rhapsody_mcp.dashboard.page_text import json_bytes
from rhapsody_mcp.dashboard.spans import Spans
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.values import preview_text
from rhapsody_mcp.runtime.tasks import Task, leaves, name_of

__all__ = ["chrome_trace"]

_MICRO = 1e6
_ARGUMENT_CHARS = 500
_SESSION = 1
"""The process of the trace that has the counters; the lanes of the backends follow."""


def chrome_trace(view: SessionView) -> bytes:
    """The JSON text: a process a backend and node, a thread a lane, an event a span, arrows from tasks to those that
    need them, and counters of waiting and running tasks. Times are in microseconds since the first submission.

    `view` has caught up. Tasks that have not ended are left out.
    """
    spans = view.spans
    ended = view.session.ended
    first = spans.first or 0.0
    events = [*_names(view.name, spans)]
    threads = _threads(spans)
    places: dict[str, tuple[int, int, float, float]] = {}
    for span in spans:
        task = ended[span.end]
        process, thread = threads[span.lane]
        start, end = (span.started - first) * _MICRO, (span.ended - first) * _MICRO
        places.setdefault(task.uid, (process, thread, start, end))
        events.append(
            {
                "ph": "X",
                "name": name_of(task),
                "cat": spans.groups[span.group],
                "ts": round(start, 3),
                "dur": round(end - start, 3),
                "pid": process,
                "tid": thread,
                "args": _arguments(task),
            }
        )
    events += [*_arrows(ended, places), *_counters(spans, first)]
    return json_bytes({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"session": view.name}})


def _threads(spans: Spans) -> list[tuple[int, int]]:
    """The process and the thread of each lane."""
    processes: dict[tuple[str, str], int] = {}
    for number in spans.order():
        processes.setdefault(spans.lanes[number][:2], len(processes) + _SESSION + 1)
    position = {lane: number for number, lane in enumerate(spans.order())}
    return [(processes[lane[:2]], position[number] + 1) for number, lane in enumerate(spans.lanes)]


def _names(session: str, spans: Spans) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", session, _SESSION, 0)
    lanes = list(zip(spans.lanes, _threads(spans), strict=True))
    for process, name in {process: " ".join(filter(None, lane[:2])) for lane, (process, _) in lanes}.items():
        yield _metadata("process_name", name, process, 0)
    for lane, (process, thread) in lanes:
        yield _metadata("thread_name", f"{lane.kind} {lane.number}", process, thread)
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}


def _metadata(what: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _arguments(task: Task) -> dict[str, Any]:
    outcome = task.outcome
    assert outcome is not None
    fields = {
        "uid": task.uid,
        "state": task.counted_as,
        "queue_s": task.timing.queue_s,
        "attempts": task.attempts,
        "cause": str(outcome.cause or ""),
        "error": outcome.error[:_ARGUMENT_CHARS],
        "result": preview_text(outcome.value, _ARGUMENT_CHARS) if outcome.value is not None else "",
        "nodes": ", ".join(outcome.nodes),
    }
    if outcome.usage is not None:
        fields |= {"prompt_tokens": outcome.usage.prompt_tokens, "completion_tokens": outcome.usage.completion_tokens}
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _arrows(ended: list[Task], places: dict[str, tuple[int, int, float, float]]) -> Iterator[dict[str, Any]]:
    number = 0
    for task in ended:
        if (target := places.get(task.uid)) is None:
            continue
        for source in leaves(task.sources()):
            if (start := places.get(source.uid)) is not None:
                number += 1
                arrow = {"name": "needs", "cat": "needs", "id": number}
                yield {"ph": "s", **arrow, "ts": round(start[3], 3), "pid": start[0], "tid": start[1]}
                yield {"ph": "f", "bp": "e", **arrow, "ts": round(target[2], 3), "pid": target[0], "tid": target[1]}


def _counters(spans: Spans, first: float) -> Iterator[dict[str, Any]]:
    changes: list[tuple[float, int, int]] = []
    for row in range(len(spans)):
        if spans.counts_task(row):
            ended = spans.ended[row]
            started = ended - spans.execution_s[row]
            changes += [(started - spans.queue_s[row], 1, 0), (started, -1, 1), (ended, 0, -1)]
    waiting = running = 0
    for at, more_waiting, more_running in sorted(changes):
        waiting, running = waiting + more_waiting, running + more_running
        arguments = {"waiting": waiting, "running": running}
        yield {
            "ph": "C",
            "name": "tasks",
            "pid": _SESSION,
            "tid": 0,
            "ts": round((at - first) * _MICRO, 3),
            "args": arguments,
        }
