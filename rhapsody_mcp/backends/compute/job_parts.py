"""Merges the outcomes of a job's ranks on several nodes into the outcome of the job."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from rhapsody_mcp.model.outcome import Measured, Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause, TaskState

__all__ = ["JobPart", "failed_rank", "merged"]


class JobPart(NamedTuple):
    """The ranks of a job on one node, and their outcome as the node reported it."""

    node: str
    ranks: tuple[int, ...]
    outcome: Outcome


def merged(parts: Sequence[JobPart], failed_first: str | None = None) -> Outcome:
    """The outcome of the job: DONE if all parts are. Value and output are those of rank 0, which is in the first part.

    Of the parts that are not DONE one decides: a part that was stopped, or else that of the node `failed_first`, or
    else that of the first failed rank.
    """
    if len(parts) == 1:
        return parts[0].outcome
    outcomes = [part.outcome for part in parts]
    not_done = [part for part in parts if part.outcome.state is not TaskState.DONE]
    first = outcomes[0]
    deciding = min(not_done, key=lambda part: _rank_of_decision(part, failed_first)).outcome if not_done else first
    return msgspec.structs.replace(
        deciding,
        started=min((outcome.started for outcome in outcomes if outcome.started is not None), default=None),
        ended=max(outcome.ended for outcome in outcomes),
        value=None if not_done else first.value,
        stdout=first.stdout,
        stderr=first.stderr,
        ranks=tuple(sorted((rank for part in parts for rank in _ranks(part)), key=lambda rank: rank.rank)),
        notes=_notes(parts),
        progress=next((outcome.progress for outcome in outcomes if outcome.progress is not None), None),
        measured=_measured([outcome.measured for outcome in outcomes if outcome.measured is not None]),
    )


def _measured(parts: Sequence[Measured]) -> Measured | None:
    if not parts:
        return None
    peaks = [part.peak_memory_bytes for part in parts if part.peak_memory_bytes is not None]
    return Measured(sum(part.cpu_s for part in parts), max(peaks, default=None))


def failed_rank(part: JobPart) -> int:
    """The first failed rank of a part that failed; its first rank where none was started."""
    return min((rank.rank for rank in part.outcome.ranks if rank.cause is not None), default=part.ranks[0])


def _rank_of_decision(part: JobPart, failed_first: str | None) -> tuple[bool, bool, bool, int]:
    timed_out, canceled = part.outcome.cause is Cause.TIMEOUT, part.outcome.state is TaskState.CANCELED
    return not timed_out, not canceled, part.node != failed_first, failed_rank(part)


def _ranks(part: JobPart) -> list[RankOutcome]:
    """The ranks of a part; those that were not started have the cause of the part."""
    started = {rank.rank: rank for rank in part.outcome.ranks}
    outcome = part.outcome
    return [
        started.get(rank) or RankOutcome(rank, part.node, cause=outcome.cause or Cause.CANCELED, error=outcome.error)
        for rank in part.ranks
    ]


def _notes(parts: Sequence[JobPart]) -> tuple[str, ...]:
    """The notes of all parts, each with its nodes."""
    nodes: defaultdict[str, list[str]] = defaultdict(list)
    for part in parts:
        for note in part.outcome.notes:
            nodes[note].append(part.node)
    return tuple(f"{_where(names, len(parts))}: {note}" for note, names in nodes.items())


def _where(names: Sequence[str], count: int) -> str:
    if len(names) == count:
        return f"on each of its {count} nodes"
    more = f" and {len(names) - _NAMED} more nodes" if len(names) > _NAMED else ""
    return f"on {', '.join(names[:_NAMED])}{more}"


_NAMED = 5
