"""What came of one task, in full detail but bounded."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Value
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.toolsets.previews import Preview, preview_part, preview_value, tail
from rhapsody_mcp.toolsets.replies import (
    Reply,
    TaskRow,
    one_line,
    quoted,
    reply,
    rounded,
    shortened,
    task_row,
    untrusted,
)

__all__ = ["RankRow", "TaskResult", "show_result"]

_TRACEBACK_CHARS = 3000
_RANK_ROWS, _RANK_CHARS = 16, 200


class RankRow(Reply):
    rank: int
    host: str
    exit_code: int | None = None
    preview: str | None = None
    error: str | None = None


class TaskResult(TaskRow):
    queue_seconds: float | None = None
    type: Annotated[str | None, Field(description="Type of the result.")] = None
    length: Annotated[int | None, Field(description="Items of the result.")] = None
    traceback: str | None = None
    exit_code: int | None = None
    stdout: Annotated[str | None, Field(description="Untrusted output of the task: its end.")] = None
    stdout_bytes: int | None = None
    stderr: Annotated[str | None, Field(description="Untrusted output of the task: its end.")] = None
    stderr_bytes: int | None = None
    rank: int | None = None
    rank_count: int | None = None
    ranks: list[RankRow] | None = None
    notes: list[str] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


async def show_result(task: Task, *, path: str, rank: int | None, max_bytes: int, output_bytes: int) -> CallToolResult:
    """Of one rank of a job, or of the whole task. Raises InvalidTask for a path that leads nowhere."""
    if task.outcome is None:
        return _not_ended(task)
    source: Outcome | RankOutcome = task.outcome if rank is None else _rank(task.outcome, rank)
    shown = None if source.value is None else await preview_part(source.value, path, max_bytes)
    fields = task_row(task).model_dump() | _value_fields(shown) | _failure_fields(source)
    fields |= await _output_fields(source, output_bytes) | _account_fields(task, task.outcome)
    data = TaskResult(**fields, rank=rank)
    return reply(_text(data, shown), data)


def _not_ended(task: Task) -> CallToolResult:
    data = TaskResult(**task_row(task).model_dump())
    return reply(f"{data.head()}, so there is no result yet. Next: wait_tasks with this task.", data)


def _rank(outcome: Outcome, rank: int) -> RankOutcome:
    if rank >= len(outcome.ranks):
        if not outcome.ranks:
            raise InvalidRequest("this task is no job of many ranks; leave rank out.")
        raise InvalidRequest(f"this task has no rank {rank}. Valid: 0 to {len(outcome.ranks) - 1}.")
    return outcome.ranks[rank]


def _value_fields(shown: Preview | None) -> dict[str, Any]:
    if shown is None:
        return {}
    fields: dict[str, Any] = {"type": shown.type, "length": shown.length, "result_bytes": shown.size}
    return fields | ({"result": shown.value} if shown.complete else {"preview": shown.text})


async def _output_fields(source: Outcome | RankOutcome, max_bytes: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"exit_code": source.exit_code}
    for name, stream in (("stdout", source.stdout), ("stderr", source.stderr)):
        if text := await tail(stream, max_bytes):
            fields |= {name: text, f"{name}_bytes": stream.size or len(stream.text.encode())}
    return fields


def _failure_fields(source: Outcome | RankOutcome) -> dict[str, Any]:
    return {
        "cause": source.cause,
        "error": shortened(source.error, _TRACEBACK_CHARS) or None,
        "traceback": None
        if source.cause is Cause.INVALID  # it never ran: the frames would be this package's
        else shortened(source.traceback, _TRACEBACK_CHARS) or None,
    }


def _account_fields(task: Task, outcome: Outcome) -> dict[str, Any]:
    usage = outcome.usage
    return {
        "queue_seconds": rounded(task.timing.queue_s),
        "notes": list(outcome.notes) or None,
        "rank_count": len(outcome.ranks) or None,
        "ranks": [_rank_row(rank) for rank in _telling_ranks(outcome)] or None,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
    }


def _telling_ranks(outcome: Outcome) -> list[RankOutcome]:
    """Those that failed first, and not more than can be read."""
    return sorted(outcome.ranks, key=lambda rank: not (rank.error or rank.exit_code))[:_RANK_ROWS]


def _rank_row(rank: RankOutcome) -> RankRow:
    return RankRow(
        rank=rank.rank,
        host=rank.host,
        exit_code=rank.exit_code,
        preview=None if rank.value is None else _short_preview(rank.value),
        error=shortened(rank.error, _RANK_CHARS) or None,
    )


def _short_preview(value: Value) -> str:
    shown = preview_value(value, _RANK_CHARS)
    return quoted(shown.text) if shown.opaque else shown.text


def _text(data: TaskResult, shown: Preview | None) -> str:
    told = f": {data.cause}: {one_line(data.error)}" if data.error else ""
    lines = [data.head() + ("" if data.rank is None else f", rank {data.rank} of {data.rank_count}") + told]
    if shown is not None:
        lines += _result_lines(shown)
    if data.exit_code is not None:
        lines.append(f"exit code {data.exit_code}")
    lines += data.notes or []
    if data.traceback:
        lines += untrusted("traceback", data.traceback, len(data.traceback.encode()))
    if data.stdout and data.stdout.strip() != data.result:
        lines += untrusted("stdout", data.stdout, data.stdout_bytes or 0)
    lines += untrusted("stderr", data.stderr or "", data.stderr_bytes or 0)
    if data.ranks and data.rank is None:
        lines += _rank_lines(data)
    return "\n".join(lines)


def _result_lines(shown: Preview) -> list[str]:
    marked = f"result ({shown.described}), untrusted output of the task"
    if shown.complete:
        return [f"{marked}:", one_line(shown.text)]
    if shown.opaque:
        how = "A Python object, which only another function can read"
        return [f"{marked}:", quoted(shown.text), f'{how}: pass it on as {{"ref": ...}} in submit_tasks.']
    part = "" if shown.type == "str" else 'Take a part with path, as in "/0". '
    return [
        f"{marked}, its first {len(shown.text)} characters:",
        f"{one_line(shown.text)} ...",
        f'{part}To use it whole, pass {{"ref": ...}} in submit_tasks.',
    ]


def _rank_lines(data: TaskResult) -> list[str]:
    rows = data.ranks or []
    told = [(row, row.error or row.preview or f"exit code {row.exit_code}") for row in rows]
    lines = [f"rank {row.rank} on {row.host} (untrusted output): {one_line(text)}" for row, text in told]
    more = (data.rank_count or 0) - len(rows)
    return lines + ([f"... and {more} more ranks: ask for one with rank."] if more else [])
