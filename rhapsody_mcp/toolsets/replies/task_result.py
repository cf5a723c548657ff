"""Finds what `get_result` shows of one task: a page or a description of its value, and excerpts of its output."""

from __future__ import annotations

from typing import NamedTuple

import anyio.to_thread
from mcp.types import CallToolResult

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask
from rhapsody_mcp.model.json_pointer import split_pointer
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.values import Value, is_index
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, kind_of, name_of
from rhapsody_mcp.toolsets.output.excerpts import (
    Excerpt,
    OutputEnd,
    read_excerpt,
    search_in_children,
    search_in_value,
)
from rhapsody_mcp.toolsets.output.sources import ends_of_sources, sources_of
from rhapsody_mcp.toolsets.replies.base import fitted
from rhapsody_mcp.toolsets.replies.kept_files import readable_part
from rhapsody_mcp.toolsets.replies.object_view import SHOWN, DescribedResult, Picture, view_object
from rhapsody_mcp.toolsets.replies.pagination import Page, first_index, page_of_items, page_of_value
from rhapsody_mcp.toolsets.replies.previews import json_item
from rhapsody_mcp.toolsets.replies.result_reply import REQUESTED_OUTPUT_BYTES, ResultReply, Shown
from rhapsody_mcp.toolsets.replies.running import show_running

__all__ = ["PageRequest", "read_part", "show_result"]

_OUTPUT_BYTES = 1024
"""Bytes of stdout and of stderr in a reply to a call that does not ask for output."""


class PageRequest(NamedTuple):
    """The part of a result that the agent asks for; of a picture, within bytes and pixels."""

    path: str
    start: int | None
    limit: int | None
    max_bytes: int
    picture_bounds: tuple[int, int] = SHOWN

    @property
    def is_default(self) -> bool:
        return not self.path and self.start is None and self.limit is None


async def show_result(
    session: Session,
    task: Task,
    request: PageRequest,
    *,
    rank: int | None,
    output: OutputEnd | None,
    search: str | None,
) -> CallToolResult:
    """The result of the task or of one rank of a job. A call that asks for output alone gets a description of the
    value.

    Raises InvalidTask where there is nothing at the path, and InvalidRequest where there is nothing at the start.
    """
    if task.outcome is None:
        reading = search is not None or output is not None
        room = REQUESTED_OUTPUT_BYTES if reading else _OUTPUT_BYTES
        running = await show_running(session, task, rank=rank, end=output or "tail", search=search, max_bytes=room)
        return running or await show_result(session, task, request, rank=rank, output=output, search=search)
    source: Outcome | RankOutcome = task.outcome if rank is None else _rank(task.outcome, rank)
    asks_for_output = search is not None or output is not None
    shown: Shown
    if asks_for_output and request.is_default:
        shown = _description(task, source)
    else:
        shown = await _read_value(session, task, source, request)
    if search is None and output is not None and isinstance(task, ForEach):
        excerpts = await ends_of_sources(session, sources_of(task), output, REQUESTED_OUTPUT_BYTES)
    elif search is None:
        excerpts = await _ends(source, output or "tail", REQUESTED_OUTPUT_BYTES if asks_for_output else _OUTPUT_BYTES)
    else:
        excerpts = await _search(task, source, search)
        if isinstance(shown, DescribedResult) and _FOUND_IN_RESULT not in excerpts and _is_searched(task, source):
            shown = DescribedResult(shown.value, on_request=True, why="search did not look into it")
    if not asks_for_output and _contains(task, shown, excerpts["stdout"]):
        del excerpts["stdout"]
    return fitted(ResultReply(task, task.outcome, source, rank, shown, excerpts, request.max_bytes).build)


async def read_part(session: Session, task: Task, request: PageRequest) -> Shown:
    """The part of a task's result. Raises as `show_result`, and InvalidRequest where the task has not ended."""
    if task.outcome is None:
        raise InvalidRequest(f"{name_of(task)} has not ended, so there is no result yet.")
    return await _read_value(session, task, task.outcome, request)


def _rank(outcome: Outcome, rank: int) -> RankOutcome:
    if rank >= len(outcome.ranks):
        if not outcome.ranks:
            raise InvalidRequest("this task is no job of many ranks; leave rank out.")
        raise InvalidRequest(f"this task has no rank {rank}. Valid: 0 to {len(outcome.ranks) - 1}.")
    return outcome.ranks[rank]


# --- the output


_FOUND_IN_RESULT = "found_in_result"


async def _ends(source: Outcome | RankOutcome, end: OutputEnd, max_bytes: int) -> dict[str, Excerpt]:
    streams = {"stdout": source.stdout, "stderr": source.stderr}
    return {name: await read_excerpt(stream, end, None, max_bytes) for name, stream in streams.items()}


async def _search(task: Task, source: Outcome | RankOutcome, search: str) -> dict[str, Excerpt]:
    """The lines that the search finds in the result, and in stdout and stderr."""
    if isinstance(task, ForEach):
        excerpts = await search_in_children(task, search, REQUESTED_OUTPUT_BYTES)
    else:
        streams = {"stdout": source.stdout, "stderr": source.stderr}
        excerpts = {
            name: await read_excerpt(stream, "tail", search, REQUESTED_OUTPUT_BYTES) for name, stream in streams.items()
        }
    if source.value is not None and _is_searched(task, source):
        lines = await search_in_value(source.value, search, REQUESTED_OUTPUT_BYTES)
        excerpts = excerpts if lines is None else {_FOUND_IN_RESULT: lines, **excerpts}
    return excerpts


def _is_searched(task: Task, source: Outcome | RankOutcome) -> bool:
    """Whether a search looks into the value: the value of a program is its stdout."""
    return source.value is not None and kind_of(task) != "executable"


def _contains(task: Task, shown: Shown, stdout: Excerpt) -> bool:
    """Whether the value shows the output too, as the value of a program is its stdout."""
    if isinstance(shown, Picture) or (isinstance(task, ComputeTask) and task.stdout_form == "json"):
        return kind_of(task) == "executable" and shown is not None
    if isinstance(shown, DescribedResult):
        return shown.value.type == "bytes"
    return shown is not None and stdout.text.strip() in (shown.text or "")


# --- the value


def _description(task: Task, source: Outcome | RankOutcome) -> DescribedResult | None:
    value = source.value
    if value is None and isinstance(task, ForEach) and task.children:
        page = _page_of_children(task, PageRequest("", None, None, 0))
        value = Value("json", "list", page.size, length=page.total)
    return None if value is None else DescribedResult(value, on_request=True)


async def _read_value(session: Session, task: Task, source: Outcome | RankOutcome, request: PageRequest) -> Shown:
    """A page of the value, a picture, or the description of an object that no worker could show."""
    value, path = source.value, request.path
    if isinstance(task, ForEach) and task.children:
        if not path:
            return _page_of_children(task, request)
        value, path = _value_of_child(task, path)
    if value is None:
        return None
    if value.format == "files" and (found := await anyio.to_thread.run_sync(readable_part, value, path)):
        value, path = found
    part = (path, request.start, request.limit, request.max_bytes)
    if value.format != "json":
        shown = await view_object(session, value, *part, request.picture_bounds, session.software_of(task))
        if isinstance(shown, DescribedResult) and not request._replace(path=path).is_default:
            raise InvalidRequest(
                f"this result is a Python object of type {value.type}, which only another function can read now: "
                f'{shown.why}. Pass {{"ref": "{name_of(task)}"}} to a function that returns the part.'
            )
        return shown
    if value.file is None:
        return page_of_value(value, *part)
    return await anyio.to_thread.run_sync(page_of_value, value, *part)


def _page_of_children(task: ForEach, request: PageRequest) -> Page:
    values = [child.outcome.value for child in task.children if child.outcome]
    size = sum(value.size for value in values if value)
    total = len(task.children)
    first = first_index(request.start, total, "items")
    items = (json_item(child) for child in task.children[first:])
    return page_of_items(items, Page("list", size, total, first), request.limit, request.max_bytes)


def _value_of_child(task: ForEach, path: str) -> tuple[Value, str]:
    """The value of the child that the path leads through, and the rest of the path."""
    step = split_pointer(path)[0]
    if not is_index(step) or int(step) >= len(task.children):
        raise InvalidTask(f"path {path!r} leads nowhere: at {step!r} there is a list of length {len(task.children)}.")
    child = task.children[int(step)]
    if child.outcome is None or child.outcome.value is None:
        raise InvalidTask(f"path {path!r} leads nowhere: {child.name} ended {child.state} and has no result.")
    return child.outcome.value, path[len(step) + 1 :]
