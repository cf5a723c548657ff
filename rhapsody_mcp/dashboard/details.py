"""What the page shows of one task, and of many in a table, as plain JSON data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.values import Stream, preview_text
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Task, kind_of, name_of

__all__ = ["describe_task", "matching", "row_of"]

_RESULT_CHARS = 4000
_OUTPUT_CHARS = 16_000
_TEXT_CHARS = 20_000
_RANKS_SHOWN, _SOURCES_SHOWN, _CHILDREN_SHOWN = 64, 50, 200
_RANK_CHARS = 500
_ALSO_ZERO = ("exit_code", "worker", "queue_s", "execution_s")
"""Fields of which 0 says something."""


def row_of(task: Task) -> dict[str, Any]:
    """The row of a table."""
    return {
        "uid": task.uid,
        "name": name_of(task),
        "kind": kind_of(task),
        "state": task.counted_as,
        "queue_s": task.timing.queue_s,
        "execution_s": task.timing.execution_s,
        "started": task.started if task.outcome is None else None,
        "error": task.outcome.error.partition("\n")[0][:300] if task.outcome else "",
        "replaced": task.replaced_by is not None,
    }


def describe_task(task: Task, output_chars: int = _OUTPUT_CHARS) -> dict[str, Any]:
    """All that the page shows of a task, each text cut to what a page has room for. Fields without content are left
    out. What a running task has printed is not here."""
    timing, outcome = task.timing, task.outcome
    fields = {
        **row_of(task),
        "what": task.what[:_TEXT_CHARS],
        "backend": task.backend,
        "nodes": list(task.nodes)[:_RANKS_SHOWN],
        "worker": outcome.worker if outcome is not None else task.started_in,
        "attempts": task.attempts,
        "priority": task.priority,
        "held_until": task.held_until,
        "last_failure": task.last_failure,
        "submitted": task.submitted,
        "started": timing.started or task.started,
        "ended": timing.ended,
        "sources": _names(task.sources(), _SOURCES_SHOWN),
        "children": _names(task.children, _CHILDREN_SHOWN) if isinstance(task, ForEach) else [],
        "needs": _needs(task),
        "progress": msgspec.to_builtins(task.progress) if task.progress is not None else None,
        **(_ended(outcome, output_chars) if outcome is not None else {}),
    }
    return {name: value for name, value in fields.items() if value not in (None, "", [], {}, 0) or name in _ALSO_ZERO}


def _names(tasks: Iterable[Task], most: int) -> list[dict[str, str]]:
    unique = list({task.uid: task for task in tasks}.values())
    return [{"uid": task.uid, "name": name_of(task), "state": task.counted_as} for task in unique[:most]]


def _needs(task: Task) -> dict[str, Any]:
    if not isinstance(task, ComputeTask) or not task.layout.groups:
        return {}
    return {"ranks": task.layout.ranks, **msgspec.to_builtins(task.layout.needs)}


def _ended(outcome: Outcome, output_chars: int) -> dict[str, Any]:
    return {
        "cause": str(outcome.cause) if outcome.cause else "",
        "error": outcome.error[:_TEXT_CHARS],
        "traceback": outcome.traceback[-_TEXT_CHARS:],
        "exit_code": outcome.exit_code,
        "notes": list(outcome.notes),
        "measured": msgspec.to_builtins(outcome.measured) if outcome.measured is not None else None,
        "usage": msgspec.to_builtins(outcome.usage) if outcome.usage is not None else None,
        "result": preview_text(outcome.value, _RESULT_CHARS) if outcome.value is not None else "",
        "stdout": _printed(outcome.stdout, output_chars),
        "stderr": _printed(outcome.stderr, output_chars),
        "ranks": [
            {
                "rank": rank.rank,
                "host": rank.host,
                "exit_code": rank.exit_code,
                "error": rank.error[:_RANK_CHARS],
                "stdout": rank.stdout.text[-_RANK_CHARS:],
                "stderr": rank.stderr.text[-_RANK_CHARS:],
            }
            for rank in outcome.ranks[:_RANKS_SHOWN]
        ],
    }


def _printed(stream: Stream, most: int) -> dict[str, Any] | None:
    """The end of an output, with the size of the whole in bytes; no file is read."""
    text = stream.text[-most:] if most else ""
    return {"text": text, "size": stream.size or len(stream.text.encode())} if stream.text else None


def matching(tasks: Sequence[Task], states: Sequence[str], name: str) -> list[Task]:
    """The tasks in these states, all where none is given, whose name or uid contains a text, without case."""
    wanted, text = set(states), name.casefold()
    return [
        task
        for task in tasks
        if (not wanted or (task.counted_as in wanted and task.replaced_by is None))
        and (not text or text in name_of(task).casefold() or text in task.uid)
    ]
