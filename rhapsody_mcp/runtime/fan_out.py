"""What a ForEach is made of and what comes of it: items out of a result, and one list out of many results."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rhapsody_mcp.engine.output import write_file
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import INLINE_BYTES, NOTHING, PREVIEW_CHARS, Value, follow, load_json
from rhapsody_mcp.runtime.tasks import ForEach, Part, Task, name_of

__all__ = ["join", "outcome_of", "read_items"]


async def read_items(source: Part) -> list[Any]:
    """The items of a list that is JSON. Raises InvalidTask where it is none."""
    value = source.task.outcome.value if source.task.outcome else None
    if value is None:
        raise InvalidTask(f"for_each needs a list, and {name_of(source.task)} has no result.")
    items = await asyncio.to_thread(_read, value, source.path) if value.file else _read(value, source.path)
    if not isinstance(items, list):
        at = f" at {source.path}" if source.path else ""
        name, kind = name_of(source.task), type(items).__name__
        raise InvalidTask(f"for_each needs a list, and the result of {name}{at} is of type {kind}.")
    return items


def _read(value: Value, path: str) -> Any:
    return follow(load_json(value), path)


async def join(values: Sequence[Value | None], folder: Path) -> Value:
    """The list of these values, which are all JSON; null for None."""
    if any(value and value.file for value in values) or sum(value.size for value in values if value) > INLINE_BYTES:
        return await asyncio.to_thread(_join, values, folder)
    return _join(values, folder)


def _join(values: Sequence[Value | None], folder: Path) -> Value:
    data = b"[" + b",".join((value or NOTHING).read() for value in values) + b"]"
    if len(data) <= INLINE_BYTES:
        return Value("json", "list", len(data), data, length=len(values))
    preview = data[:PREVIEW_CHARS].decode("utf-8", "ignore")
    return Value("json", "list", len(data), None, write_file(data, str(folder)), len(values), preview)


def outcome_of(task: ForEach, value: Value | None) -> Outcome:
    """What came of it, all of its children having ended."""
    outcomes = [child.outcome for child in task.children if child.outcome is not None]
    started = min((outcome.started for outcome in outcomes if outcome.started is not None), default=None)
    ended = max((outcome.ended for outcome in outcomes), default=time.time())
    bad: list[Task] = [child for child in task.children if child.state is not TaskState.DONE]
    if not bad:
        return Outcome(state=TaskState.DONE, started=started, ended=ended, value=value)
    first = next((child for child in bad if child.state is TaskState.FAILED), bad[0])
    cause = first.cause or Cause.ERROR
    states = Counter(child.state.value for child in bad)
    told = " and ".join(f"{count} {state}" for state, count in states.items())
    message = f"of {len(task.children)} tasks {told}; {first.name}: {first.outcome.error if first.outcome else ''}"
    return Outcome(state=first.state, started=started, ended=ended, value=value, cause=cause, error=message)
