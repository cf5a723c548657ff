"""A session as HTML for the cells of a notebook: without scripts, and short however many tasks there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from rhapsody_mcp.dashboard.picture import stream_svg
from rhapsody_mcp.dashboard.spans import STATES
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.live.progress import Progress, progress_text
from rhapsody_mcp.runtime.tasks import name_of
from rhapsody_mcp.runtime.tasks.task_html import STATE_COLORS, card, chips, duration, failure, rounded

__all__ = ["session_html"]

_MOST_BARS = 4000
_FAILURES_SHOWN, _RUNNING_SHOWN, _NOTICES_SHOWN, _BACKENDS_SHOWN = 5, 5, 3, 5
_LINE_CHARS = 300
_BAR_ORDER = (*STATES, "RUNNING", "QUEUED", "WAITING")
_DIM = "color:#5b6675"


def session_html(view: SessionView) -> str:
    """The counts by state, the failures by cause, numbers, and the task stream. `view` has caught up."""
    head = view.head()
    counts: dict[str, int] = head["counts"]
    shown: dict[str, int | str] = {state: f"{count:,}" for state, count in counts.items()}
    return card(
        f"<b>{escape(view.name)}</b>{' (closed)' * view.session.closed} &nbsp; {chips(shown) or 'no tasks yet'}",
        _bar(counts),
        *(f'<div style="{_DIM}">{escape(line[:_LINE_CHARS])}</div>' for line in _lines(view, head) if line),
        *_failures(head["failures"]),
        f'<div style="margin-top:10px;overflow-x:auto">{stream_svg(view, most_bars=_MOST_BARS)}</div>'
        if counts
        else "",
    )


def _bar(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = (
        f'<span style="width:{100 * count / total:.2f}%;background:{STATE_COLORS[state]}"></span>'
        for state in _BAR_ORDER
        if (count := counts.get(state))
    )
    return (
        '<div style="display:flex;height:8px;border-radius:4px;overflow:hidden;background:#f6f7f9;margin:8px 0 4px">'
        f"{''.join(parts)}</div>"
    )


def _lines(view: SessionView, head: Mapping[str, Any]) -> Iterator[str]:
    """What is said in words: engines, numbers, running tasks, notices."""
    backends = head["backends"][:_BACKENDS_SHOWN]
    yield " · ".join(f"{backend['name']}: {engine}" for backend in backends if (engine := _engine(backend)))
    yield " · ".join(_numbers(head))
    told = [(task, task.progress) for task in view.running() if task.progress is not None]
    for task, progress in told[:_RUNNING_SHOWN]:
        yield f"{name_of(task)}: {_progress(progress)}"
    for notice in head["notices"][-_NOTICES_SHOWN:]:
        yield notice["text"]


def _engine(backend: Mapping[str, Any]) -> str:
    workers = f"{backend['workers']} workers" if backend["workers"] else ""
    return ", ".join(filter(None, [workers, backend["engine"]]))


def _progress(progress: Progress) -> str:
    share = f" ({progress.step / progress.of:.0%})" if progress.step is not None and progress.of else ""
    return progress_text(progress) + share


def _numbers(head: Mapping[str, Any]) -> Iterator[str]:
    first, statistics = head["first"], head["statistics"]
    if first is not None and any(head["counts"].get(state) for state in ("WAITING", "QUEUED", "RUNNING")):
        yield f"{duration(max(0.0, head['now'] - first))} since the first task was submitted"
    if statistics is None:
        return
    yield f"{duration(statistics['makespan'])} from the first task to the last end"
    if statistics["throughput"]:
        yield f"{rounded(statistics['throughput'])} tasks a second"
    execution = statistics["times"]["execution"]
    yield f"execution {duration(execution['mean'])} on average, {duration(execution['p95'])} at the 95th percentile"
    yield from (
        f"{busy['of']} of {busy['backend']} {busy['share']:.0%} busy" for busy in statistics["busy"][:_BACKENDS_SHOWN]
    )
    if statistics["tokens"] is not None:
        yield f"{statistics['tokens']['completion_tokens']:,} tokens written"


def _failures(groups: list[dict[str, Any]]) -> Iterator[str]:
    for group in groups[:_FAILURES_SHOWN]:
        names = [task["name"] for task in group["tasks"]]
        yield failure(group["count"], group["state"], group["cause"], group["error"], group["place"], names)
    if len(groups) > _FAILURES_SHOWN:
        yield f'<div style="{_DIM};margin-top:8px">and {len(groups) - _FAILURES_SHOWN} more kinds of failures</div>'
