"""What came of one task, in full detail but bounded."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from mcp.types import CallToolResult
from pydantic import Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask
from rhapsody_mcp.model.json_pointer import split_pointer
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Value, is_index
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task, kind_of, name_of
from rhapsody_mcp.toolsets.replies.base import (
    Reply,
    Row,
    fitted,
    one_line,
    quoted,
    reply,
    rounded,
    row_fields,
    shortened,
    untrusted,
)
from rhapsody_mcp.toolsets.replies.failure_groups import FailureGroups, digest_failures
from rhapsody_mcp.toolsets.replies.object_view import Opaque, view_object
from rhapsody_mcp.toolsets.replies.output_excerpts import Excerpt, How, look, search_in_children, search_in_value
from rhapsody_mcp.toolsets.replies.pagination import Page, cut, first_of, page_of_items, page_of_value
from rhapsody_mcp.toolsets.replies.previews import advice, as_item, described, preview_value, printed_only

__all__ = ["TaskResult", "show_result"]

_TRACEBACK_CHARS = 3000
_RANK_ROWS, _RANK_CHARS, _GROUPS = 16, 200, 5
_OUTPUT_BYTES, _ASKED_OUTPUT_BYTES = 1024, 4096
"""What is shown of stdout, and of stderr, without and with being asked for."""


class RankRow(Reply):
    rank: int
    host: str
    exit_code: int | None = None
    preview: str | None = None
    error: str | None = None


_ANYTHING = WithJsonSchema({"anyOf": [{"type": kind} for kind in ("object", "array", "string", "number", "boolean")]})


class TaskResult(Row):
    """Also, where there are any: preview (of no JSON, or too long), error, traceback, stdout, failures, ranks."""

    result: Annotated[Any, _ANYTHING, Field(description="The result, or a page of it.")] = None
    next_start: int | None = None
    total: Annotated[int | None, Field(description="Items or characters.")] = None
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
    prompt_tokens: SkipJsonSchema[int | None] = None
    completion_tokens: SkipJsonSchema[int | None] = None


async def show_result(
    session: Session,
    task: Task,
    *,
    path: str,
    start: int | None,
    limit: int | None,
    rank: int | None,
    output: How | None,
    search: str | None,
    max_bytes: int,
) -> CallToolResult:
    """Of one rank of a job, or of the whole task; where its output is asked for, its result is only described.

    Raises InvalidTask for a path and InvalidRequest for a start that leads nowhere.
    """
    if task.outcome is None:
        return _not_ended(task)
    source: Outcome | RankOutcome = task.outcome if rank is None else _rank(task.outcome, rank)
    asked = search is not None or output is not None
    output_bytes = _ASKED_OUTPUT_BYTES if asked else _OUTPUT_BYTES
    shown: Page | Opaque | None
    if asked and not path and start is None and limit is None:
        shown = _only_described(task, source)
    else:
        shown = await _value(session, task, source, path, start, limit, max_bytes)
    streams = {"stdout": source.stdout, "stderr": source.stderr}
    excerpts = {name: await look(stream, output or "tail", search, output_bytes) for name, stream in streams.items()}
    if search is not None and isinstance(task, ForEach):
        excerpts = await search_in_children(task, search, output_bytes)
    if search is not None and source.value is not None and kind_of(task) != "executable":
        if (found := await search_in_value(source.value, search, output_bytes)) is not None:
            excerpts = {"found_in_result": found, **excerpts}
        elif isinstance(shown, Opaque):
            shown = Opaque(shown.value, only_described=True, why="search did not look into it")
    if not asked and _says_it_all(shown, excerpts["stdout"]):
        del excerpts["stdout"]
    view = _View(task, task.outcome, source, rank, shown, excerpts, max_bytes)
    return fitted(view.reply)


def _says_it_all(shown: Page | Opaque | None, stdout: Excerpt) -> bool:
    """A program's result is what it printed."""
    if isinstance(shown, Opaque):
        return shown.value.type == "bytes"
    return shown is not None and stdout.text.strip() in (shown.text or "")


def _not_ended(task: Task) -> CallToolResult:
    data = TaskResult(**row_fields(task))
    return reply(f"{data.head()}, so there is no result yet. Next: wait_tasks with this task.", data)


def _rank(outcome: Outcome, rank: int) -> RankOutcome:
    if rank >= len(outcome.ranks):
        if not outcome.ranks:
            raise InvalidRequest("this task is no job of many ranks; leave rank out.")
        raise InvalidRequest(f"this task has no rank {rank}. Valid: 0 to {len(outcome.ranks) - 1}.")
    return outcome.ranks[rank]


# --- its value


def _only_described(task: Task, source: Outcome | RankOutcome) -> Opaque | None:
    value = source.value
    if value is None and isinstance(task, ForEach) and task.children:
        page = _page_of_children(task, None, None, 0)
        value = Value("json", "list", page.size, length=page.total)
    return None if value is None else Opaque(value, only_described=True)


async def _value(
    session: Session,
    task: Task,
    source: Outcome | RankOutcome,
    path: str,
    start: int | None,
    limit: int | None,
    max_bytes: int,
) -> Page | Opaque | None:
    """A page of it; or what there is to say of an object that nobody could look at."""
    value = source.value
    if isinstance(task, ForEach) and task.children:
        if not path:
            return _page_of_children(task, start, limit, max_bytes)
        value, path = _value_of_child(task, path)
    if value is None:
        return None
    if value.format == "pickle":
        shown = await view_object(session, value, path, start, limit, max_bytes)
        if isinstance(shown, Opaque) and (path or start is not None or limit is not None):
            raise InvalidRequest(
                f"this result is a Python object of type {value.type}, which only another function can read now: "
                f'{shown.why}. Pass {{"ref": "{name_of(task)}"}} to a function that returns the part.'
            )
        return shown
    if value.file is None:
        return page_of_value(value, path, start, limit, max_bytes)
    return await anyio.to_thread.run_sync(page_of_value, value, path, start, limit, max_bytes)


def _page_of_children(task: ForEach, start: int | None, limit: int | None, max_bytes: int) -> Page:
    values = [child.outcome.value for child in task.children if child.outcome]
    size = sum(value.size for value in values if value)
    total = len(task.children)
    first = first_of(start, total, "items")
    items = (as_item(child) for child in task.children[first:])
    return page_of_items(items, Page("list", size, total, first), limit, max_bytes)


def _value_of_child(task: ForEach, path: str) -> tuple[Value, str]:
    """Its Value, and the path into that."""
    step = split_pointer(path)[0]
    if not is_index(step) or int(step) >= len(task.children):
        raise InvalidTask(f"path {path!r} leads nowhere: at {step!r} there is a list of length {len(task.children)}.")
    child = task.children[int(step)]
    if child.outcome is None or child.outcome.value is None:
        raise InvalidTask(f"path {path!r} leads nowhere: {child.name} ended {child.state} and has no result.")
    return child.outcome.value, path[len(step) + 1 :]


# --- the reply


class _View:
    """What there is to tell, and how it is told in a given share of the usual room."""

    def __init__(
        self,
        task: Task,
        outcome: Outcome,
        source: Outcome | RankOutcome,
        rank: int | None,
        shown: Page | Opaque | None,
        excerpts: dict[str, Excerpt],
        value_bytes: int,
    ) -> None:
        self.task, self.outcome, self.source, self.rank = task, outcome, source, rank
        self.shown, self.excerpts, self.value_bytes = shown, excerpts, value_bytes

    def reply(self, share: float) -> CallToolResult:
        room = int(self.value_bytes * share)
        page = cut(self.shown, room) if isinstance(self.shown, Page) else None
        opaque = self.shown if isinstance(self.shown, Opaque) else None
        excerpts = {name: whole.cut(int(_ASKED_OUTPUT_BYTES * share)) for name, whole in self.excerpts.items()}
        fields = row_fields(self.task) | _failure_fields(self.task, self.source, share)
        fields |= _page_fields(page) if page else _opaque_fields(opaque, room) if opaque else {}
        fields |= _output_fields(self.source, excerpts) | _account_fields(self.task, self.outcome, share)
        data = TaskResult(**fields, rank=self.rank)
        lines = [_first_line(data)]
        if page and (printed := printed_only(self.source.value, self.source.stdout)):
            lines.append(f"result: {printed}")
        else:
            lines += _page_lines(page, self.task) if page else _opaque_lines(opaque, data, self.task) if opaque else []
        return reply("\n".join([*lines, *_other_lines(data, excerpts)]), data)


def _page_fields(page: Page) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": page.view_of or page.type, "result_bytes": page.size, "total": page.total}
    fields |= {"preview": page.json} if page.broken else {"result": page.data}
    more = page.total is not None and page.end < page.total
    return fields | {"start": page.start or None, "next_start": page.end if more and not page.broken else None}


def _opaque_fields(opaque: Opaque, max_chars: int) -> dict[str, Any]:
    value = opaque.value
    fields: dict[str, Any] = {"type": value.type, "result_bytes": value.size, "total": value.length}
    shown = value.preview[:max_chars] or f"({described(value)})"
    return fields if opaque.only_described else fields | {"preview": shown}


def _failure_fields(task: Task, source: Outcome | RankOutcome, share: float) -> dict[str, Any]:
    most = int(_TRACEBACK_CHARS * share)
    never_ran = source.cause is Cause.INVALID  # the frames would be this package's
    groups = digest_failures(task.children, share)[:_GROUPS] if isinstance(task, ForEach) else []
    return {
        "cause": source.cause,
        "error": shortened(source.error, most) or None,
        "traceback": None if never_ran else shortened(source.traceback, most) or None,
        "failures": groups or None,
    }


def _output_fields(source: Outcome | RankOutcome, excerpts: dict[str, Excerpt]) -> dict[str, Any]:
    fields: dict[str, Any] = {"exit_code": source.exit_code}
    for name, excerpt in excerpts.items():
        if excerpt.text:
            fields |= {name: excerpt.text, f"{name}_bytes": excerpt.size}
    return fields


def _account_fields(task: Task, outcome: Outcome, share: float) -> dict[str, Any]:
    usage = outcome.usage
    ranks = [_rank_row(rank, int(_RANK_CHARS * share)) for rank in _telling_ranks(outcome)]
    return {
        "queue_seconds": rounded(task.timing.queue_s),
        "notes": [shortened(note, int(_TRACEBACK_CHARS * share)) for note in outcome.notes] or None,
        "rank_count": len(outcome.ranks) or None,
        "ranks": ranks or None,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
    }


def _telling_ranks(outcome: Outcome) -> list[RankOutcome]:
    """Those that failed first, and not more than can be read."""
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
    marked = f"result ({page.described}), untrusted output of the task"
    whole = not page.start and (page.total is None or page.end >= page.total)
    if page.broken:
        part = f"{marked}; item {page.start} alone is too long, this is its beginning:"
        more = f'Take a part of it with path, as in path="/{page.start}".' if page.total else ""
    elif whole:
        return [f"{marked}:", one_line(page.json), *([_view_text(page, task)] if page.view_of else [])]
    else:
        part = f"{marked}; {page.unit} {page.start} to {page.end - 1}:"
        more = f"Next page: start={page.end}." if page.end < (page.total or 0) else ""
    if page.view_of:
        more = f"{more} {_view_text(page, task)}".strip()
    use = f'To use it whole, pass {{"ref": "{name_of(task)}"}} in submit_tasks.'
    return [part, one_line(page.json), " ".join(text for text in (more, use) if text)]


def _view_text(page: Page, task: Task) -> str:
    return (
        f"This is a plain view of a Python object of type {page.view_of}; "
        f'{{"ref": "{name_of(task)}"}} passes the object itself.'
    )


def _opaque_lines(opaque: Opaque, data: TaskResult, task: Task) -> list[str]:
    value = opaque.value
    if opaque.only_described:
        why = f"; {opaque.why}" if opaque.why else ""
        return [f"result: {described(value)}{why}; get_result without output and search shows it."]
    what = "Binary data" if value.type == "bytes" else "A Python object"
    how = f'only another function can read: pass {{"ref": "{name_of(task)}"}} in submit_tasks.'
    return [
        f"result ({described(value)}), untrusted output of the task:",
        quoted(data.preview or ""),
        f"{what}, which {how} {advice(value)}" + (f" (No view of it here: {opaque.why}.)" if opaque.why else ""),
    ]


def _other_lines(data: TaskResult, excerpts: dict[str, Excerpt]) -> list[str]:
    lines = [] if data.exit_code is None else [f"exit code {data.exit_code}"]
    lines += [one_line(note) for note in data.notes or []]
    lines += [group.line() for group in data.failures or []]
    if data.traceback:
        lines += untrusted("traceback", data.traceback, f"{len(data.traceback.encode())} bytes")
    for name, excerpt in excerpts.items():
        if excerpt.text:
            lines += untrusted(name, excerpt.text, excerpt.said)
        elif excerpt.found is not None:
            lines.append(f"{name}: no line of its {excerpt.size} bytes has what was searched for.")
    if data.ranks and data.rank is None:
        lines += _rank_lines(data)
    return lines


def _rank_lines(data: TaskResult) -> list[str]:
    rows = data.ranks or []
    told = [(row, row.error or row.preview or f"exit code {row.exit_code}") for row in rows]
    lines = [f"rank {row.rank} on {row.host} (untrusted output): {one_line(text)}" for row, text in told]
    more = (data.rank_count or 0) - len(rows)
    return lines + ([f"... and {more} more ranks: ask for one with rank."] if more else [])
