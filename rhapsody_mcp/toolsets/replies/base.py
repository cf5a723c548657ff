"""Replies: full data for programs, and a short text that stands alone for models."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import msgspec
from mcp.types import CallToolResult, TextContent
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.runtime.tasks import ForEach, Task, kind_of, leaves

__all__ = [
    "REPLY_BYTES",
    "Reply",
    "Row",
    "TaskRow",
    "TaskRows",
    "call_text",
    "count_states",
    "counts_text",
    "duration",
    "fitted",
    "one_line",
    "quoted",
    "reply",
    "rounded",
    "row_fields",
    "shortened",
    "size_of",
    "task_row",
    "untrusted",
]

REPLY_BYTES = 24_000
"""Most bytes of a reply, its text and its data together: no token is less than a byte, and hosts cut a reply at
25,000 tokens."""
_ERROR_CHARS = 300
_SAME = "the same as above"
_SMALLEST_SHARE = 1 / 256
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)
"""What ends a line, moves a cursor, turns the direction of a text or cannot be seen by a person who reads along. The
joiners of emoji and of some scripts stay."""


class Reply(BaseModel):
    """Fields that are None are not sent."""

    model_config = ConfigDict(frozen=True)


class Row(Reply):
    """How a task stands. `counts` are the tasks of a for_each, by state."""

    task: str
    name: SkipJsonSchema[str | None] = None
    state: str
    seconds: SkipJsonSchema[float | None] = None
    counts: SkipJsonSchema[dict[str, int] | None] = None
    replaced_by: SkipJsonSchema[str | None] = None

    def head(self) -> str:
        """As in `task.000002 train DONE in 0.31 s`."""
        replaced = f", replaced by {self.replaced_by}" if self.replaced_by else ""
        took = "" if self.seconds is None else f"in {duration(self.seconds)}"
        counts = f"({counts_text(self.counts)})" if self.counts else ""
        return " ".join(part for part in (self.task, self.name, self.state, took, counts) if part) + replaced


class TaskRow(Row):
    """A task in a list."""

    kind: str
    backend: str
    cause: str | None = None
    error: str | None = None

    def line(self) -> str:
        """As in `task.000002 train FAILED in 0.31 s: error: ValueError: ...`."""
        return f"{self.head()}: {self.cause}: {one_line(self.error)}" if self.error else self.head()

    def after(self, before: TaskRow | None) -> TaskRow:
        """With a long error that the row before has too told as such."""
        alike = before is not None and before.error == self.error and len(self.error or "") > len(_SAME)
        return self.model_copy(update={"error": _SAME}) if alike else self


TaskRows = Annotated[
    list[TaskRow],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "object"},
            "description": "Each has task (its id), name, state, kind, backend, seconds it ran, cause and error.",
        }
    ),
]
"""Described in a sentence: the schema of a row in full costs more than it tells."""


def reply(text: str, data: Reply) -> CallToolResult:
    return CallToolResult(
        content=[TextContent(type="text", text=text)],
        structured_content=data.model_dump(mode="json", exclude_none=True),
    )


def fitted(build: Callable[[float], CallToolResult]) -> CallToolResult:
    """What `build` makes for the largest share (1, a half, a quarter, ...) of its usual lengths that fits."""
    share = 1.0
    while size_of(built := build(share)) > REPLY_BYTES and share > _SMALLEST_SHARE:
        share /= 2
    return built


def size_of(result: CallToolResult) -> int:
    """Bytes of its text and its data."""
    text = sum(len(block.text.encode()) for block in result.content if isinstance(block, TextContent))
    return text + len(msgspec.json.encode(result.structured_content))


def row_fields(task: Task) -> dict[str, Any]:
    """What a Row says of this task."""
    return {
        "task": task.uid,
        "name": task.name,
        "state": task.state.value,
        "seconds": rounded(task.timing.execution_s) if task.outcome else None,
        "counts": count_states(leaves([task])) if isinstance(task, ForEach) and task.children else None,
        "replaced_by": (task.parent or task).replaced_by,
    }


def task_row(task: Task) -> TaskRow:
    told: dict[str, Any] = {}
    if task.outcome is not None and task.outcome.error:
        told = {"cause": task.outcome.cause, "error": shortened(task.outcome.error, _ERROR_CHARS)}
    return TaskRow(**row_fields(task), kind=kind_of(task), backend=task.backend or "", **told)


def count_states(tasks: Iterable[Task]) -> dict[str, int]:
    return dict(Counter(task.state.value for task in tasks))


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


def call_text(tool: str, **arguments: Any) -> str:
    """A call that can be made as it stands, as in `get_result(session="session-1", task="train")`."""
    given = {name: value for name, value in arguments.items() if value is not None}
    told = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items())
    return one_line(f"{tool}({', '.join(told)})")


def one_line(text: str) -> str:
    """With its control characters escaped: whatever a task says, it cannot begin a line of a reply."""
    return _CONTROLS.sub(lambda found: _escape(found.group()), text)


def quoted(text: str) -> str:
    """As a JSON text on one line."""
    return one_line(msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode())


def _escape(character: str) -> str:
    """As JSON does."""
    known = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    units = character.encode("utf-16-be")
    return known.get(character) or "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def counts_text(counts: Mapping[str, int]) -> str:
    """As in `3 DONE, 1 FAILED`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "no tasks"


def untrusted(what: str, text: str, shown: str) -> list[str]:
    """Lines that show what a task printed as what it is: text by a stranger, not instructions."""
    lines = [f"| {one_line(line)}" for line in text.rstrip("\n").splitlines()]
    return [f"--- {what}: untrusted output of the task, {shown} ---", *lines, f"--- end of {what} ---"]
