"""The reply of `submit_tasks`: the ids, names, states and backends of the tasks of one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from mcp.types import CallToolResult
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import Task, leaves
from rhapsody_mcp.toolsets.replies.base import Reply, count_states, reply
from rhapsody_mcp.toolsets.replies.formatting import NAMES_SHOWN, counts_text
from rhapsody_mcp.toolsets.tooling.schemas import TYPE_ONLY

__all__ = ["SubmissionReport", "backends_text", "report_fields", "submission_report", "uid_range"]


class SubmissionReport(Reply):
    session: str
    submitted: int
    first: Annotated[str, Field(description="Id; the others count on in order.")]
    last: str
    names: Annotated[dict[str, str], TYPE_ONLY]
    counts: Annotated[dict[str, int], TYPE_ONLY]
    backends: Annotated[dict[str, int], TYPE_ONLY]
    repeated: SkipJsonSchema[bool | None] = None
    """By an earlier call with the same key."""
    graph: SkipJsonSchema[list[dict[str, Any]] | None] = None
    """Of a dry run, as `problems`; its ids are those to be."""
    problems: SkipJsonSchema[list[str] | None] = None


def report_fields(open_session: OpenSession, tasks: Sequence[Task]) -> dict[str, Any]:
    singles = leaves(tasks)
    names = {task.name: task.uid for task in tasks if task.name}
    return {
        "session": open_session.id,
        "submitted": len(tasks),
        "first": tasks[0].uid,
        "last": tasks[-1].uid,
        "names": names if len(names) <= NAMES_SHOWN else {},  # the agent knows the names: a long list is a waste
        "counts": count_states(singles),
        "backends": dict(Counter(task.backend or "" for task in singles)),
    }


def submission_report(data: SubmissionReport, notes: Sequence[str]) -> CallToolResult:
    next_step = f'Next: wait_tasks(session="{data.session}").'
    return reply("\n".join([_first_line(data), *notes, next_step]), data)


def _first_line(data: SubmissionReport) -> str:
    names = f" Named: {', '.join(f'{name} = {uid}' for name, uid in data.names.items())}." if data.names else ""
    singles = sum(data.counts.values())
    each = "" if singles == data.submitted else f"{singles} with those of for_each: "
    where = f"({each}{backends_text(data.backends)}; {counts_text(data.counts)})"
    return f"Submitted {data.submitted}: {uid_range(data.first, data.last)} {where}.{names}"


def uid_range(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def backends_text(backends: Mapping[str, int]) -> str:
    """As in `2 on dragon, 1 on vllm`."""
    return ", ".join(f"{count} on {name}" for name, count in backends.items())
