"""Replies: full data for programs, and a short text that stands alone for models."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.model.live.progress import HISTORY, Progress, progress_fields, progress_text
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.tasks import ForEach, Task, kind_of, leaves
from rhapsody_mcp.toolsets.replies.formatting import counts_text, duration, limited_list, one_line, rounded, shortened

__all__ = [
    "REPLY_BYTES",
    "Reply",
    "Row",
    "TaskRow",
    "TaskRows",
    "count_states",
    "fitted",
    "reply",
    "row_fields",
    "size_of",
    "task_row",
    "told_fields",
]

REPLY_BYTES = 24_000
"""Most bytes of a reply, its text and its data together: no token is less than a byte, and hosts cut a reply at
25,000 tokens."""
_ERROR_CHARS = 300
_SAME = "the same as above"
_NODES = 3
_TOLD_CHARS = 150
_SMALLEST_SHARE = 1 / 256
_NUMBERS = 20
_HISTORY_VALUES, _LEAST_HISTORY = 200, 2
"""How many earlier values of numbers a reply has in all its rows, and the fewest that are worth it of a number."""


class Reply(BaseModel):
    """Fields that are None are not sent."""

    model_config = ConfigDict(frozen=True)


class Row(Reply):
    """How a task stands. `counts` are the tasks of a for_each, by state; `attempts` are given from the second on."""

    task: str
    name: SkipJsonSchema[str | None] = None
    state: str
    seconds: SkipJsonSchema[float | None] = None
    attempts: SkipJsonSchema[int | None] = None
    most_attempts: SkipJsonSchema[int | None] = None
    nodes: SkipJsonSchema[str | None] = None
    counts: SkipJsonSchema[dict[str, int] | None] = None
    progress: SkipJsonSchema[dict[str, Any] | None] = None
    replaced_by: SkipJsonSchema[str | None] = None

    def head(self) -> str:
        """As in `task.000002 train DONE in 0.31 s on node1`, or `RUNNING for 2.50 s, attempt 2 of 4`."""
        replaced = f", replaced by {self.replaced_by}" if self.replaced_by else ""
        running = self.state == TaskState.RUNNING
        took = "" if self.seconds is None else f"{'for' if running else 'in'} {duration(self.seconds)}"
        where = f"on {self.nodes}" if self.nodes else ""
        counts = f"({counts_text(self.counts)})" if self.counts else ""
        told = f"({one_line(shortened(self.told, _TOLD_CHARS))})" if self.told else ""
        tried = f", attempt {self.attempts} of {self.most_attempts}" if running and self.attempts else ""
        parts = (self.task, self.name, self.state, took, where, counts, told)
        return " ".join(part for part in parts if part) + tried + replaced

    @property
    def told(self) -> str:
        """What the task has told last, as in `3 of 20, epoch 3, loss 0.4`."""
        return progress_text(Progress(0.0, **self.progress)) if self.progress else ""


class TaskRow(Row):
    """A task in a list. `seconds` of a running task are those so far."""

    kind: str
    backend: str
    cause: str | None = None
    error: str | None = None

    def line(self, previous: TaskRow | None = None) -> str:
        """As in `task.000002 train FAILED in 0.31 s: error: ValueError: ...`; a long error that the row before has too
        is not repeated."""
        repeats = previous is not None and previous.error == self.error and len(self.error or "") > len(_SAME)
        error = _SAME if repeats else one_line(self.error or "")
        return f"{self.head()}: {self.cause}: {error}" if self.error else self.head()


TaskRows = Annotated[
    list[TaskRow],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "object"},
        }
    ),
]
"""Rows whose schema is one sentence, as the full schema costs more tokens than it is worth."""


def reply(text: str, data: Reply, *pictures: ImageContent) -> CallToolResult:
    return CallToolResult(
        content=[TextContent(type="text", text=text), *pictures],
        structured_content=data.model_dump(mode="json", exclude_none=True),
    )


def fitted(build: Callable[[float], CallToolResult]) -> CallToolResult:
    """The reply that `build` makes for the largest share (1, 1/2, 1/4, ...) of its usual lengths that fits."""
    share = 1.0
    while size_of(result := build(share)) > REPLY_BYTES and share > _SMALLEST_SHARE:
        share /= 2
    return result


def size_of(result: CallToolResult) -> int:
    """Bytes of the text and the data."""
    text = sum(len(block.text.encode()) for block in result.content if isinstance(block, TextContent))
    return text + len(msgspec.json.encode(result.structured_content))


def told_fields(progress: Progress, share: float = 1.0, rows: int | None = None) -> dict[str, Any]:
    """What a task has told: its numbers with the last values of each, in one of so many rows as many as there is room
    for."""
    numbers = dict(list(progress.numbers.items())[: int(_NUMBERS * share)])
    most = HISTORY if rows is None else _HISTORY_VALUES // max(1, rows * len(numbers))
    values = int(min(most, HISTORY) * share)
    told = {name: progress.history[name] for name in numbers if name in progress.history}
    history = {name: earlier[-values:] for name, earlier in told.items()} if values >= _LEAST_HISTORY else {}
    fields = {**progress_fields(progress), "numbers": numbers, "history": history}
    return {name: value for name, value in fields.items() if value not in ({}, None, "")}


def row_fields(task: Task, share: float = 1.0, rows: int | None = None) -> dict[str, Any]:
    """The fields of a Row for this task, by itself or one of so many rows."""
    return {
        "task": task.uid,
        "name": task.name,
        "state": task.state.value,
        "seconds": rounded(task.timing.execution_s) if task.outcome else None,
        "attempts": task.attempts if task.attempts > 1 else None,
        "most_attempts": max(task.attempts, task.most_attempts) if task.attempts > 1 else None,
        "nodes": limited_list(task.nodes, _NODES) or None,
        "progress": told_fields(task.progress, share, rows) if task.progress is not None else None,
        "counts": count_states(leaves([task])) if isinstance(task, ForEach) and task.children else None,
        "replaced_by": (task.parent or task).replaced_by,
    }


def task_row(task: Task, share: float, rows: int) -> TaskRow:
    fields, failure = row_fields(task, share, rows), dict[str, Any]()
    if task.outcome is not None and task.outcome.error:
        failure = {"cause": task.outcome.cause, "error": shortened(task.outcome.error, int(_ERROR_CHARS * share))}
    if task.state is TaskState.RUNNING and task.started is not None:
        fields["seconds"] = rounded(max(0.0, time.time() - task.started))
    return TaskRow(**fields, kind=kind_of(task), backend=task.backend or "", **failure)


def count_states(tasks: Iterable[Task]) -> dict[str, int]:
    return dict(Counter(task.counted_as for task in tasks))
