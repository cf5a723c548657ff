"""Tasks as HTML for the cells of a notebook: without scripts, every text of a task escaped and cut."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Protocol

from rhapsody_mcp.model.live.progress import Progress, progress_text
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.timing import Timing
from rhapsody_mcp.model.values import Stream, preview_text
from rhapsody_mcp.runtime.tasks.failures import failure_key, failure_place, is_failure

__all__ = ["STATE_COLORS", "card", "chips", "duration", "failure", "for_each_html", "rounded", "task_html"]

STATE_COLORS = {
    **{"WAITING": "#b9c0ca", "QUEUED": "#8fa3bf", "RUNNING": "#2f7de1", "DONE": "#2f9e62", "FAILED": "#d03b3b"},
    **{"CANCELED": "#a06a1b", "skipped": "#98a2ae"},
}
"""As in the page."""
_TEXT, _DIM, _LINE, _RAISED = "#1c2430", "#5b6675", "#d9dde3", "#f6f7f9"
_TEXT_CHARS = 2000
_TRACE_CHARS = 4000
_LINE_CHARS = 300
_NAMES_SHOWN, _NODES_SHOWN, _NOTES_SHOWN, _GROUPS_SHOWN = 4, 8, 5, 5


class ShownTask(Protocol):
    """A task, as it is shown."""

    @property
    def uid(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def what(self) -> str: ...
    @property
    def counted_as(self) -> str: ...
    @property
    def backend(self) -> str | None: ...
    @property
    def nodes(self) -> tuple[str, ...]: ...
    @property
    def attempts(self) -> int: ...
    @property
    def held_until(self) -> str: ...
    @property
    def submitted(self) -> float | None: ...
    @property
    def started(self) -> float | None: ...
    @property
    def timing(self) -> Timing: ...
    @property
    def progress(self) -> Progress | None: ...
    @property
    def outcome(self) -> Outcome | None: ...


# --- what all is made of


def card(*parts: str) -> str:
    """White with dark text in every theme of a notebook; what cannot be sent as UTF-8 is replaced."""
    style = f"background:#fff;color:{_TEXT};border:1px solid {_LINE};border-radius:8px;padding:10px 12px;"
    style += "max-width:920px;overflow-x:auto;font:13px/1.45 system-ui,'DejaVu Sans',sans-serif"
    return f'<div style="{style}">{"".join(parts)}</div>'.encode("utf-8", "replace").decode()


def chips(counts: Mapping[str, int | str]) -> str:
    """The states, each with its colour and what is said of it."""
    return "".join(
        f'<span style="white-space:nowrap;margin-right:14px"><span style="display:inline-block;width:10px;height:10px;'
        f'border-radius:3px;background:{STATE_COLORS.get(state, _DIM)}"></span> {escape(f"{state} {said}".rstrip())}'
        "</span>"
        for state, said in counts.items()
    )


def failure(count: int, state: str, cause: str, error: str, place: str, names: Iterable[str]) -> str:
    """Failures with one cause: their number, the first one's error and place, and names of tasks."""
    shown = [escape(name[:_LINE_CHARS]) for _, name in zip(range(_NAMES_SHOWN), names, strict=False)]
    more = [f"{count - len(shown):,} more"] if count > len(shown) else []
    where = escape(place[:_LINE_CHARS]) + " &middot; " * bool(place)
    return (
        f'<div style="border-left:4px solid {STATE_COLORS[state]};padding-left:8px;margin-top:8px">'
        f"<b>{count:,} {state} ({cause})</b>: {escape(error.partition(chr(10))[0][:_LINE_CHARS])}"
        f'<div style="color:{_DIM}">{where}{", ".join([*shown, *more])}</div></div>'
    )


def duration(seconds: float) -> str:
    """As in `0.25 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, more = divmod(minutes, 60)
    return f"{hours} h {more} min" if hours else f"{minutes} min {rest} s"


def rounded(number: float) -> str:
    """As in `0.25`, `12.3` or `35,059`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


# --- tasks


def task_html(task: ShownTask) -> str:
    """The task with its times, its result or error, and the end of what it printed."""
    cells = f'style="background:#fff;color:{_TEXT};text-align:left;vertical-align:top;padding:2px 12px 2px 0;border:0"'
    rows = "".join(
        f'<tr style="background:#fff"><th {cells}>{name}</th><td {cells}>{content}</td></tr>'
        for name, content in _rows(task)
        if content
    )
    return card(_title(task), f'<table style="border-collapse:collapse;margin:6px 0 0;font:inherit">{rows}</table>')


def for_each_html(task: ShownTask, children: Sequence[ShownTask]) -> str:
    """A ForEach: how many of its tasks are in each state, and their failures by cause."""
    if not children:
        return task_html(task)
    counts = Counter(child.counted_as for child in children)
    shown = {state: f"{counts[state]:,}" for state in ("NEW", *STATE_COLORS) if counts[state]}
    return card(_title(task), f'<div style="margin-top:6px">{chips(shown)}</div>', *_failures(children))


def _failures(children: Iterable[ShownTask]) -> Iterator[str]:
    groups: dict[tuple[bool, str, str], list[tuple[str, Outcome]]] = {}
    for child in children:
        outcome = child.outcome
        if outcome is not None and is_failure(outcome):
            groups.setdefault(failure_key(outcome), []).append((child.name or child.uid, outcome))
    for key in sorted(groups, key=lambda key: (key[0], -len(groups[key])))[:_GROUPS_SHOWN]:
        group, outcome = groups[key], groups[key][0][1]
        said = outcome.state.value, str(outcome.cause), outcome.error, failure_place(outcome)
        yield failure(len(group), *said, (name for name, _ in group))


def _title(task: ShownTask) -> str:
    name, cause = escape((task.name or task.uid)[:_LINE_CHARS]), task.outcome.cause if task.outcome else None
    uid = f' <span style="color:{_DIM}">{escape(task.uid)}</span>' if task.name else ""
    return f"<b>{name}</b>{uid} &nbsp; {chips({task.counted_as: f'({cause})' if cause else ''})}"


def _rows(task: ShownTask) -> Iterator[tuple[str, str]]:
    """Names, and what stands beside them as HTML."""
    outcome = task.outcome
    yield "runs", escape(task.what[:_LINE_CHARS])
    yield "on", escape(", ".join([*filter(None, [task.backend]), *task.nodes[:_NODES_SHOWN]]))
    yield "submitted", time.strftime("%H:%M:%S", time.localtime(task.submitted)) if task.submitted else ""
    yield "times", _times(task)
    yield "attempts", str(task.attempts) if task.attempts > 1 else ""
    yield "waits until", escape(task.held_until) if outcome is None else ""
    yield "progress", escape(progress_text(task.progress)[:_LINE_CHARS]) if task.progress is not None else ""
    if outcome is not None:
        yield from _ended(outcome)


def _times(task: ShownTask) -> str:
    timing = task.timing
    if timing.queue_s is not None and timing.execution_s is not None:
        ran = f", {duration(timing.execution_s)} of execution" if timing.started is not None else ""
        return f"{duration(timing.queue_s)} in the queue{ran}"
    began, word = (task.started, "runs") if task.started is not None else (task.submitted, "waits")
    return f"{word} for {duration(max(0.0, time.time() - began))}" if began is not None else ""


def _ended(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "error", _pre(outcome.error[:_TEXT_CHARS])
    yield "traceback", _pre(outcome.traceback[-_TRACE_CHARS:])
    yield "exit code", str(outcome.exit_code) if outcome.exit_code else ""
    yield "ranks", str(len(outcome.ranks) or "")
    yield "result", _pre(preview_text(outcome.value, _TEXT_CHARS)) if outcome.value is not None else ""
    usage = outcome.usage
    yield "tokens", f"{usage.prompt_tokens} in, {usage.completion_tokens} out" if usage is not None else ""
    yield "stdout", _printed(outcome.stdout)
    yield "stderr", _printed(outcome.stderr)
    yield "notes", "<br>".join(escape(note[:_LINE_CHARS]) for note in outcome.notes[:_NOTES_SHOWN])


def _printed(stream: Stream) -> str:
    size = stream.size or len(stream.text.encode("utf-8", "replace"))
    cut = len(stream.text) > _TEXT_CHARS or stream.file is not None
    return _pre(stream.text[-_TEXT_CHARS:]) + (f"the end of {size:,} bytes" if cut else "")


def _pre(text: str) -> str:
    style = f"background:{_RAISED};color:{_TEXT};border:1px solid {_LINE};border-radius:6px;padding:6px 8px;margin:0;"
    style += "max-height:300px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.4 monospace"
    return f'<pre style="{style}">{escape(text)}</pre>' if text.strip() else ""
