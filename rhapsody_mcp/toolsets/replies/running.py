"""The reply of `get_result` for a task that has not ended: how far it is, and what it has printed so far."""

from __future__ import annotations

import time
from typing import Any

from mcp.types import CallToolResult
from msgspec.structs import replace

from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of
from rhapsody_mcp.toolsets.output.excerpts import Excerpt, OutputEnd, search_in_children
from rhapsody_mcp.toolsets.output.live import live_excerpts
from rhapsody_mcp.toolsets.output.sources import OutputSource, check_rank, ends_of_sources, sources_of
from rhapsody_mcp.toolsets.replies.base import fitted, reply, row_fields
from rhapsody_mcp.toolsets.replies.formatting import duration, untrusted
from rhapsody_mcp.toolsets.replies.result_reply import TaskResult

__all__ = ["show_running"]


async def show_running(
    session: Session, task: Task, *, rank: int | None, end: OutputEnd, search: str | None, max_bytes: int
) -> CallToolResult | None:
    """None where the task has ended meanwhile. Raises InvalidRequest for a rank that the task does not have."""
    check_rank(task, rank)
    sources = sources_of(task, rank) if isinstance(task, ForEach) or task.state is TaskState.RUNNING else []
    excerpts = await _excerpts(session, task, sources, end, search, max_bytes)
    if task.state.final:
        return None

    def build(share: float) -> CallToolResult:
        shown = {name: whole.cut(int(max_bytes * share)) for name, whole in excerpts.items() if whole.text}
        output: dict[str, Any] = {name: excerpt.text for name, excerpt in shown.items()}
        output |= {f"{name}_bytes": excerpt.size for name, excerpt in shown.items()}
        data = TaskResult(**row_fields(task, share), **output, rank=rank)
        lines = [_first_line(data, task), *_other_lines(excerpts, search is not None)]
        for name, excerpt in shown.items():
            lines += untrusted(name, excerpt.text, f"{excerpt.extent} so far")
        return reply("\n".join([*lines, f"Next: wait_tasks with {name_of(task)}."]), data)

    return fitted(build)


async def _excerpts(
    session: Session, task: Task, sources: list[OutputSource], end: OutputEnd, search: str | None, max_bytes: int
) -> dict[str, Excerpt]:
    if search is None:
        return await ends_of_sources(session, sources, end, max_bytes)
    ended = await search_in_children(task, search, max_bytes) if isinstance(task, ForEach) else {}
    found = {name: replace(excerpt, text=f"{excerpt.text}\n" * bool(excerpt.text)) for name, excerpt in ended.items()}
    for source, rank, label in sources:
        if source.outcome is None:
            live = await live_excerpts(session, source, rank, end, search, max_bytes)
            for name, excerpt in (live or {}).items():
                found[name] = _added(found.get(name), excerpt, label, max_bytes)
    return found


def _added(earlier: Excerpt | None, excerpt: Excerpt, label: str, max_bytes: int) -> Excerpt:
    lines = "".join(f"{f'{label} ' if label else ''}{line}\n" for line in excerpt.text.splitlines())
    if earlier is None:
        return Excerpt("head", lines, excerpt.size, excerpt.found)
    text = f"{earlier.text}{lines}" if len(earlier.text) + len(lines) <= max_bytes else earlier.text
    return Excerpt("head", text, earlier.size + excerpt.size, (earlier.found or 0) + (excerpt.found or 0))


def _first_line(data: TaskResult, task: Task) -> str:
    if task.state is not TaskState.RUNNING or task.started is None:
        return f"{data.head()}, so there is no result yet."
    return f"{data.head()} for {duration(max(0.0, time.time() - task.started))}; its result comes when it ends."


def _other_lines(excerpts: dict[str, Excerpt], is_search: bool) -> list[str]:
    if not is_search:
        is_silent = excerpts and not any(excerpt.size for excerpt in excerpts.values())
        return ["It has printed nothing so far that it has flushed."] if is_silent else []
    empty = [name for name, excerpt in excerpts.items() if not excerpt.text]
    return [f"{name}: no line of its {excerpts[name].size} bytes so far has what was searched for." for name in empty]
