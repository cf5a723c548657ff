"""The outputs of a for_each or a job together, each line after the name of who printed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of
from rhapsody_mcp.toolsets.output.excerpts import Excerpt, OutputEnd, read_excerpt
from rhapsody_mcp.toolsets.output.feed import printed_by
from rhapsody_mcp.toolsets.output.live import STREAMS, live_excerpts

__all__ = ["OutputSource", "check_rank", "ends_of_sources", "rank_count", "sources_of"]

_SHOWN = 16
"""How many tasks or ranks share an excerpt: those that run, then those that ended last."""


class OutputSource(NamedTuple):
    """Who prints: a task, or a rank of a job; `label` tells them apart, and is empty for the only one."""

    task: Task
    rank: int = 0
    label: str = ""

    async def ends(self, session: Session, end: OutputEnd, max_bytes: int) -> dict[str, Excerpt]:
        """One end of its stdout and stderr."""
        if self.task.outcome is None:
            live = await live_excerpts(session, self.task, self.rank, end, None, max_bytes)
            if live is not None or self.task.outcome is None:
                return live or {}
        printed = printed_by(self.task.outcome, self.rank)
        return {name: await read_excerpt(getattr(printed, name), end, None, max_bytes) for name in STREAMS}


def sources_of(task: Task, rank: int | None = None) -> list[OutputSource]:
    """Everyone who prints for a task that has started: its ranks, or the tasks of a for_each."""
    if isinstance(task, ForEach):
        return [OutputSource(child, 0, name_of(child)) for child in task.children if _has_started(child)]
    count = rank_count(task)
    if rank is not None or count == 1:
        return [OutputSource(task, rank or 0)]
    return [OutputSource(task, number, f"[{number}]") for number in range(count)]


def _has_started(task: Task) -> bool:
    return task.state is TaskState.RUNNING or task.outcome is not None


def check_rank(task: Task, rank: int | None) -> None:
    """Raises InvalidRequest for a rank that the task does not have."""
    if rank is not None and not 0 <= rank < (count := rank_count(task)):
        raise InvalidRequest(f"this task has no rank {rank}. Valid: 0 to {count - 1}.")


def rank_count(task: Task) -> int:
    """The ranks of a job; 1 for any other task."""
    layout = getattr(task, "layout", None)
    return layout.ranks if layout is not None and layout.mode == "job" else 1


async def ends_of_sources(
    session: Session, sources: Sequence[OutputSource], end: OutputEnd, max_bytes: int
) -> dict[str, Excerpt]:
    """One end of each output, at most `max_bytes` of stdout and of stderr in all. Where not all are shown, a line says
    so."""
    if len(sources) == 1 and not sources[0].label:
        return await sources[0].ends(session, end, max_bytes)
    shown = _shown(sources)
    parts = [(source.label, await source.ends(session, end, max_bytes // max(1, len(shown)))) for source in shown]
    note = f"[{len(shown)} of {len(sources)} shown]" if len(shown) < len(sources) else ""
    return {
        name: _joined([(label, part[name]) for label, part in parts if name in part], end, note) for name in STREAMS
    }


def _shown(sources: Sequence[OutputSource]) -> list[OutputSource]:
    """Up to `_SHOWN` sources, in their order."""
    by_interest = sorted(range(len(sources)), key=lambda index: _interest(sources[index].task))
    return [sources[index] for index in sorted(by_interest[:_SHOWN])]


def _interest(task: Task) -> float:
    return 0.0 if task.outcome is None else -task.outcome.ended


def _joined(parts: Sequence[tuple[str, Excerpt]], end: OutputEnd, note: str) -> Excerpt:
    """The lines of all, with the note at the end that stays where the text is cut."""
    lines = [f"{label} {line}" for label, part in parts for line in part.text.splitlines()]
    if lines and note:
        lines = [*lines, note] if end == "tail" else [note, *lines]
    size, left_out = sum(part.size for _, part in parts), sum(part.left_out for _, part in parts)
    return Excerpt(end, "".join(f"{line}\n" for line in lines), size, left_out=left_out)
