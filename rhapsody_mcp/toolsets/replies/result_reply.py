"""The reply of `get_result`: the value, the failure and the output of one task, bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mcp.types import CallToolResult, ImageContent
from pydantic import WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.backends.compute.node_pool import needs_text
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, name_of
from rhapsody_mcp.toolsets.output.excerpts import Excerpt
from rhapsody_mcp.toolsets.replies.base import Reply, Row, reply, row_fields
from rhapsody_mcp.toolsets.replies.failure_groups import FailureGroups, group_failures
from rhapsody_mcp.toolsets.replies.formatting import one_line, quoted, rounded, shortened, untrusted
from rhapsody_mcp.toolsets.replies.object_view import DescribedResult, Picture
from rhapsody_mcp.toolsets.replies.pagination import Page, cut_page
from rhapsody_mcp.toolsets.replies.previews import described, plain_value_advice, preview_value, printed_only_text

__all__ = ["REQUESTED_OUTPUT_BYTES", "ResultReply", "Shown", "TaskResult"]

Shown = Page | Picture | DescribedResult | None
"""What a reply has of a value; None where there is no value."""

REQUESTED_OUTPUT_BYTES = 4096
"""Bytes of stdout and of stderr in a reply to a call that asks for output."""
_TRACEBACK_CHARS = 3000
_RANK_ROWS, _RANK_CHARS, _GROUPS = 16, 200, 5


class RankRow(Reply):
    rank: int
    host: str
    exit_code: int | None = None
    preview: str | None = None
    error: str | None = None


_ANYTHING = WithJsonSchema({"anyOf": [{"type": kind} for kind in ("object", "array", "string", "number", "boolean")]})


class TaskResult(Row):
    result: Annotated[Any, _ANYTHING] = None
    next_start: int | None = None
    total: int | None = None
    columns: SkipJsonSchema[list[str] | None] = None
    type: SkipJsonSchema[str | None] = None
    preview: SkipJsonSchema[str | None] = None
    start: SkipJsonSchema[int | None] = None
    result_bytes: SkipJsonSchema[int | None] = None
    cause: SkipJsonSchema[str | None] = None
    error: SkipJsonSchema[str | None] = None
    traceback: SkipJsonSchema[str | None] = None
    exit_code: SkipJsonSchema[int | None] = None
    stdout: SkipJsonSchema[str | None] = None
    stdout_bytes: SkipJsonSchema[int | None] = None
    stderr: SkipJsonSchema[str | None] = None
    stderr_bytes: SkipJsonSchema[int | None] = None
    found_in_result: SkipJsonSchema[str | None] = None
    found_in_result_bytes: SkipJsonSchema[int | None] = None
    failures: SkipJsonSchema[FailureGroups | None] = None
    rank: SkipJsonSchema[int | None] = None
    rank_count: SkipJsonSchema[int | None] = None
    ranks: SkipJsonSchema[list[RankRow] | None] = None
    notes: SkipJsonSchema[list[str] | None] = None
    queue_seconds: SkipJsonSchema[float | None] = None
    asked_for: SkipJsonSchema[str | None] = None
    cpu_seconds: SkipJsonSchema[float | None] = None
    peak_memory_gb: SkipJsonSchema[float | None] = None
    prompt_tokens: SkipJsonSchema[int | None] = None
    completion_tokens: SkipJsonSchema[int | None] = None


@dataclass(frozen=True)
class ResultReply:
    """The parts of a reply: `source` is a rank of a job or the whole outcome, `shown` its value."""

    task: Task
    outcome: Outcome
    source: Outcome | RankOutcome
    rank: int | None
    shown: Shown
    excerpts: dict[str, Excerpt]
    value_bytes: int

    def build(self, share: float) -> CallToolResult:
        """The reply with a share of the usual lengths."""
        room, shown = int(self.value_bytes * share), self.shown
        excerpts = {name: whole.cut(int(REQUESTED_OUTPUT_BYTES * share)) for name, whole in self.excerpts.items()}
        if isinstance(shown, Page):
            shown = cut_page(shown, room)
        fields = row_fields(self.task, share) | _failure_fields(self.task, self.source, share)
        fields |= _value_fields(shown, room) | _output_fields(self.source, excerpts)
        data = TaskResult(**fields, **_run_fields(self.task, self.outcome, share), rank=self.rank)
        lines = [_first_line(data), *self._value_lines(shown, data), *_other_lines(data, excerpts)]
        return reply("\n".join(lines), data, *_image(shown))

    def _value_lines(self, shown: Shown, data: TaskResult) -> list[str]:
        if isinstance(shown, DescribedResult):
            return _described_lines(shown, data, self.task)
        if isinstance(shown, Picture):
            return _picture_lines(shown, self.task)
        if shown is None:
            return []
        printed = printed_only_text(self.source.value, self.source.stdout)
        return [f"result: {printed}"] if printed else _page_lines(shown, self.task)


# --- as data


def _value_fields(shown: Shown, max_chars: int) -> dict[str, Any]:
    if shown is None:
        return {}
    if isinstance(shown, Picture):
        return {"type": shown.mime_type, "result_bytes": shown.size, "preview": shown.about}
    return _page_fields(shown) if isinstance(shown, Page) else _described_fields(shown, max_chars)


def _image(shown: Shown) -> list[ImageContent]:
    if not isinstance(shown, Picture) or not shown.base64:
        return []
    return [ImageContent(type="image", data=shown.base64, mime_type=shown.mime_type)]


def _page_fields(page: Page) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": page.view_of or page.type, "result_bytes": page.size, "total": page.total}
    fields |= {"preview": page.json} if page.broken else {"result": page.data}
    fields |= {"columns": list(page.columns)} if page.columns else {}
    more = page.total is not None and page.end < page.total
    return fields | {"start": page.start or None, "next_start": page.end if more and not page.broken else None}


def _described_fields(result: DescribedResult, max_chars: int) -> dict[str, Any]:
    value = result.value
    fields: dict[str, Any] = {"type": value.type, "result_bytes": value.size, "total": value.length}
    shown = value.preview[:max_chars] or f"({described(value)})"
    return fields if result.on_request else fields | {"preview": shown}


def _failure_fields(task: Task, source: Outcome | RankOutcome, share: float) -> dict[str, Any]:
    max_chars = int(_TRACEBACK_CHARS * share)
    never_ran = source.cause is Cause.INVALID  # the frames are this package's
    groups = group_failures(task.children, share)[:_GROUPS] if isinstance(task, ForEach) else []
    return {
        "cause": source.cause,
        "error": shortened(source.error, max_chars) or None,
        "traceback": None if never_ran else shortened(source.traceback, max_chars) or None,
        "failures": groups or None,
    }


def _output_fields(source: Outcome | RankOutcome, excerpts: dict[str, Excerpt]) -> dict[str, Any]:
    fields: dict[str, Any] = {"exit_code": source.exit_code}
    for name, excerpt in excerpts.items():
        if excerpt.text:
            fields |= {name: excerpt.text, f"{name}_bytes": excerpt.size}
    return fields


def _run_fields(task: Task, outcome: Outcome, share: float) -> dict[str, Any]:
    usage = outcome.usage
    ranks = [_rank_row(rank, int(_RANK_CHARS * share)) for rank in _ranks_shown(outcome)]
    return {
        "queue_seconds": rounded(task.timing.queue_s),
        "asked_for": _asked_for(task),
        **_measured_fields(outcome),
        "notes": [shortened(note, int(_TRACEBACK_CHARS * share)) for note in outcome.notes] or None,
        "rank_count": len(outcome.ranks) or None,
        "ranks": ranks or None,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
    }


def _asked_for(task: Task) -> str | None:
    """What the task, or each of its ranks, needs; None where it says nothing."""
    return needs_text(task.layout.needs) if isinstance(task, ComputeTask) and task.layout.needs else None


def _measured_fields(outcome: Outcome) -> dict[str, Any]:
    if (measured := outcome.measured) is None:
        return {}
    peak = measured.peak_memory_bytes
    return {"cpu_seconds": rounded(measured.cpu_s), "peak_memory_gb": None if peak is None else round(peak / 1e9, 3)}


def _ranks_shown(outcome: Outcome) -> list[RankOutcome]:
    """The ranks that get a row, failed ranks first."""
    return sorted(outcome.ranks, key=lambda rank: not (rank.error or rank.exit_code))[:_RANK_ROWS]


def _rank_row(rank: RankOutcome, max_chars: int) -> RankRow:
    return RankRow(
        rank=rank.rank,
        host=rank.host,
        exit_code=rank.exit_code,
        preview=None if rank.value is None else preview_value(rank.value, max_chars).text,
        error=shortened(rank.error, max_chars) or None,
    )


# --- as text


def _first_line(data: TaskResult) -> str:
    rank = "" if data.rank is None else f", rank {data.rank} of {data.rank_count}"
    error = f": {data.cause}: {one_line(data.error)}" if data.error else ""
    return f"{data.head()}{rank}{error}"


def _page_lines(page: Page, task: Task) -> list[str]:
    heading = f"result ({one_line(page.described)}), untrusted output of the task"
    if page.broken:
        part = f"{heading}; item {page.start} alone is too long, this is its beginning:"
        more = f'Take a part of it with path, as in path="/{page.start}".' if page.total else ""
    elif page.is_whole:
        return [f"{heading}:", *_json_lines(page), *([_view_text(page, task)] if page.view_of else [])]
    else:
        part = f"{heading}; {page.unit} {page.start} to {page.end - 1}:"
        more = f"Next page: start={page.end}." if page.end < (page.total or 0) else ""
    if page.view_of:
        more = f"{more} {_view_text(page, task)}".strip()
    whole_text = f'To use it whole, pass {{"ref": "{name_of(task)}"}} in submit_tasks.'
    return [part, *_json_lines(page), " ".join(text for text in (more, whole_text) if text)]


def _json_lines(page: Page) -> list[str]:
    columns = [f"columns: {one_line(', '.join(page.columns))}"] if page.columns else []
    return [*columns, one_line(page.json)]


def _view_text(page: Page, task: Task) -> str:
    pictures = (
        " get_result with the path of a picture shows it." if " picture" in page.json and page.text is None else ""
    )
    return (
        f"This is a plain view of a Python object of type {page.view_of}; "
        f'{{"ref": "{name_of(task)}"}} passes the object itself.{pictures}'
    )


def _picture_lines(picture: Picture, task: Task) -> list[str]:
    about, shown = one_line(picture.about), one_line(picture.shown)
    original = f'{{"ref": "{name_of(task)}"}} in submit_tasks passes the original'
    if picture.why:
        return [f"result: {about}, which cannot be shown: {one_line(picture.why)}. {original}."]
    scaled = f", scaled down to a {shown}; {original}" if shown else ""
    return [f"result ({about}), untrusted output of the task: the picture comes with this text{scaled}."]


def _described_lines(result: DescribedResult, data: TaskResult, task: Task) -> list[str]:
    value = result.value
    if result.on_request:
        why = f"; {result.why}" if result.why else ""
        return [f"result: {described(value)}{why}; get_result without output and search shows it."]
    why = f" (No view of it here: {result.why}.)" if result.why else ""
    what = "Binary data" if value.type == "bytes" else "A Python object"
    how = f'only another function can read: pass {{"ref": "{name_of(task)}"}} in submit_tasks.'
    return [
        f"result ({described(value)}), untrusted output of the task:",
        quoted(data.preview or ""),
        f"{what}, which {how} {plain_value_advice(value)}{why}",
    ]


def _other_lines(data: TaskResult, excerpts: dict[str, Excerpt]) -> list[str]:
    lines = [] if data.exit_code is None else [f"exit code {data.exit_code}"]
    if data.peak_memory_gb is not None:
        asked = f" (asked for {data.asked_for})" if data.asked_for else ""
        used = f"{data.cpu_seconds or 0:g} CPU seconds and at most {data.peak_memory_gb:g} GB of memory"
        lines.append(f"used {used}{asked}")
    lines += [one_line(note) for note in data.notes or []]
    lines += [group.line() for group in data.failures or []]
    if data.traceback:
        lines += untrusted("traceback", data.traceback, f"{len(data.traceback.encode())} bytes")
    for name, excerpt in excerpts.items():
        if excerpt.text:
            lines += untrusted(name, excerpt.text, excerpt.extent)
        elif excerpt.found is not None:
            lines.append(f"{name}: no line of its {excerpt.size} bytes has what was searched for.")
    if data.ranks and data.rank is None:
        lines += _rank_lines(data)
    return lines


def _rank_lines(data: TaskResult) -> list[str]:
    rows = data.ranks or []
    texts = [row.error or row.preview or f"exit code {row.exit_code}" for row in rows]
    lines = [
        f"rank {row.rank} on {row.host} (untrusted output): {one_line(text)}"
        for row, text in zip(rows, texts, strict=True)
    ]
    more = (data.rank_count or 0) - len(rows)
    return lines + ([f"... and {more} more ranks: ask for one with rank."] if more else [])
