"""Replies: full data for programs, and a short text that stands alone for models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from mcp.types import CallToolResult, TextContent
from pydantic import BaseModel, ConfigDict, Field

from rhapsody_mcp.runtime.session import kind_of
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.toolsets.previews import Preview, preview_value

__all__ = [
    "Reply",
    "TaskRow",
    "counts_text",
    "duration",
    "name_of",
    "one_line",
    "quoted",
    "reply",
    "rounded",
    "shortened",
    "task_row",
    "untrusted",
]

_ERROR_CHARS = 300
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Reply(BaseModel):
    """Fields that are None are not sent."""

    model_config = ConfigDict(frozen=True)


class TaskRow(Reply):
    """A task in a list. `result` is the whole result; where that is long, `preview` is its beginning."""

    task: str
    name: str | None = None
    kind: str
    backend: str
    state: str
    seconds: Annotated[float | None, Field(description="Running time.")] = None
    result: Any = None
    preview: str | None = None
    result_bytes: int | None = None
    cause: str | None = None
    error: str | None = None

    def head(self) -> str:
        """As in `task.000002 train DONE in 0.31 s`."""
        parts = [self.task, self.name or "", self.state, "" if self.seconds is None else f"in {duration(self.seconds)}"]
        return " ".join(part for part in parts if part)

    def line(self) -> str:
        """As in `task.000002 train DONE in 0.31 s: {"accuracy": 0.9}`."""
        if self.error:
            return f"{self.head()}: {self.cause}: {one_line(self.error)}"
        if self.result_bytes is None:
            return self.head()
        return f"{self.head()}: {one_line(self.preview or msgspec.json.encode(self.result).decode())}"


def reply(text: str, data: Reply) -> CallToolResult:
    return CallToolResult(
        content=[TextContent(type="text", text=text)],
        structured_content=data.model_dump(mode="json", exclude_none=True),
    )


def task_row(task: Task, result_chars: int = 0) -> TaskRow:
    """With at most `result_chars` of its result."""
    outcome = task.outcome
    row = TaskRow(task=task.uid, name=task.name, kind=kind_of(task), backend=task.backend or "", state=task.state.value)
    if outcome is None:
        return row
    told: dict[str, Any] = {"seconds": rounded(task.timing.execution_s)}
    if outcome.error:
        told |= {"cause": outcome.cause, "error": shortened(outcome.error, _ERROR_CHARS)}
    if outcome.value is not None and result_chars:
        told |= _result_fields(preview_value(outcome.value, result_chars))
    return row.model_copy(update=told)


def _result_fields(shown: Preview) -> dict[str, Any]:
    if shown.complete:
        return {"result": shown.value, "result_bytes": shown.size}
    cut = "" if shown.opaque else " ..."
    text = quoted(shown.text) if shown.opaque else shown.text
    return {"preview": f"{text}{cut} ({shown.described})", "result_bytes": shown.size}


def rounded(seconds: float | None) -> float | None:
    """To microseconds: the digits after that are noise to pay for."""
    return None if seconds is None else round(seconds, 6)


def duration(seconds: float) -> str:
    """As in `0.4 ms`, `310 ms` or `2.50 s`."""
    if seconds >= 1 or not seconds:
        return f"{seconds:.2f} s" if seconds else "0 s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def shortened(text: str, max_chars: int) -> str:
    """What is too long loses its middle, between words: a message's beginning and end say most."""
    if len(text) <= max_chars:
        return text
    begin = re.sub(r"\s+\S{0,40}\Z", "", text[: max_chars // 2])
    end = re.sub(r"\A\S{0,40}\s+", "", text[-(max_chars // 2) :])
    return f"{begin} ... {end}"


def one_line(text: str) -> str:
    """With its control characters escaped: whatever a task says, it cannot begin a line of a reply."""
    return _CONTROLS.sub(lambda found: _escape(found.group()), text)


def quoted(text: str) -> str:
    """As a JSON text on one line."""
    return one_line(msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode())


def _escape(character: str) -> str:
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character, f"\\u{ord(character):04x}")


def counts_text(counts: Mapping[str, int]) -> str:
    """As in `3 DONE, 1 FAILED`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "no tasks"


def name_of(task: Task) -> str:
    return task.name or task.uid


def untrusted(what: str, text: str, size: int) -> list[str]:
    """Lines that show what a task printed as what it is: text by a stranger, not instructions."""
    if not text:
        return []
    shown = f"last {len(text.encode())} of {size} bytes" if len(text.encode()) < size else f"{size} bytes"
    lines = [f"| {one_line(line)}" for line in text.rstrip("\n").splitlines()]
    return [f"--- {what}: untrusted output of the task, {shown} ---", *lines, f"--- end of {what} ---"]
