"""The values of a ForEach: reads its items from a result, and joins the results of its children."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from rhapsody_mcp.engine.task.output import write_file, write_pieces
from rhapsody_mcp.model.errors import InvalidTask, LimitExceeded
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.outcome import Outcome, canceled
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import INLINE_BYTES, NOTHING, PREVIEW_CHARS, Value, load_json
from rhapsody_mcp.runtime.tasks import ForEach, Part, Task, name_of

__all__ = ["join", "known_count", "list_with_files", "outcome_of", "read_items", "restored_items"]


_MAX_BYTES = 32 * 1024**2
"""The largest result that items are read from. Decoded, it takes about ten times as much memory."""
_SHORT_BYTES = 512
"""A value of so many bytes takes no more room in a list than the path of a file and what is kept of each file."""


async def read_items(source: Part) -> list[Any]:
    """The items of a JSON list. Raises InvalidTask for another result, or one that is too large."""
    value = source.task.outcome.value if source.task.outcome else None
    if value is None:
        raise InvalidTask(f"for_each needs a list, and {name_of(source.task)} has no result.", field="for_each")
    if value.size > _MAX_BYTES:
        raise InvalidTask(
            f"for_each needs a list, and the result of {name_of(source.task)} has {value.size:,} bytes; valid are up "
            f"to {_MAX_BYTES:,}. Let it write its data into files, and return a list of their paths.",
            field="for_each",
        )
    items = await asyncio.to_thread(_read, value, source.path) if value.file else _read(value, source.path)
    if not isinstance(items, list):
        at = f" at {source.path}" if source.path else ""
        name, kind = name_of(source.task), type(items).__name__
        raise InvalidTask(f"for_each needs a list, and the result of {name}{at} is of type {kind}.", field="for_each")
    return items


def known_count(source: Part) -> int | None:
    """How many items a result has that is there; None where only a worker or a long read could tell."""
    value = source.task.outcome.value if source.task.outcome else None
    if value is None:
        return None
    if not source.path and value.length is not None:
        return value.length
    items = None
    if value.format == "json" and value.data is not None:
        with suppress(InvalidTask):
            items = _read(value, source.path)
    return len(items) if isinstance(items, list) else None


def restored_items(source: Part, count: int) -> Sequence[Any]:
    """The items of a restored ForEach. Where the result is no JSON or is unreadable, each item is a Part of the source.

    Where the source is a set, its order may differ now, and a Part of it cannot be resolved.
    """
    value = source.task.outcome.value if source.task.outcome else None
    if value is not None and value.format == "json":
        with suppress(OSError, InvalidTask):
            items = _read(value, source.path)
            if isinstance(items, list):
                return items
    return [Part(source.task, f"{source.path}/{number}") for number in range(count)]


def _read(value: Value, path: str) -> Any:
    return resolve_pointer(load_json(value), path)


async def join(values: Sequence[Value | None], folder: Path, max_bytes: int | None = None) -> Value:
    """The list of JSON values, with null for None. Raises LimitExceeded for more than `max_bytes` bytes."""
    size = _checked_size(values, max_bytes)
    if any(value and value.file for value in values) or size > INLINE_BYTES:
        return await asyncio.to_thread(_join_now, values, folder)
    return _join_now(values, folder)


async def list_with_files(values: Sequence[Value | None], folder: Path, max_bytes: int | None = None) -> Value:
    """The list of values, with null for None, of which some have files. Raises LimitExceeded where they have more than
    `max_bytes` bytes without the files, which are there already."""
    _checked_size([value and (value.inner or value) for value in values], max_bytes)
    items = tuple(_without_preview(value or NOTHING) for value in values)
    if sum(map(_inline_bytes, items)) > INLINE_BYTES:
        items = await asyncio.to_thread(_in_files, items, str(folder))
    size, count = sum(item.size for item in items), len(items)
    return Value("files", "list", size, length=count, about=f"list of {count} results with files", items=items)


def _checked_size(values: Sequence[Value | None], max_bytes: int | None) -> int:
    size = sum(value.size for value in values if value)
    if max_bytes is not None and size > max_bytes:
        raise LimitExceeded(
            f"they take {size:,} bytes together, and one result has {max_bytes:,} at most (max_result_bytes in the "
            "settings of the server). Each is there under its own name; return less from each, such as the path of a "
            "file",
            "max_result_bytes",
        )
    return size


def _without_preview(value: Value) -> Value:
    return replace(value, preview="", inner=value.inner and _without_preview(value.inner))


def _inline_bytes(value: Value) -> int:
    return len((value.inner or value).data or b"")


def _in_files(values: Sequence[Value], folder: str) -> tuple[Value, ...]:
    """The values, with files in the place of data that is not short."""
    with ExitStack() as undo:
        stored = tuple(_in_file(value, folder, undo) for value in values)
        undo.pop_all()
        return stored


def _in_file(value: Value, folder: str, undo: ExitStack) -> Value:
    if value.inner is not None:
        return replace(value, inner=_in_file(value.inner, folder, undo))
    if value.data is None or len(value.data) <= _SHORT_BYTES:
        return value
    path = write_file(value.data, folder)
    undo.callback(os.unlink, path)
    return replace(value, data=None, file=path)


def _join_now(values: Sequence[Value | None], folder: Path) -> Value:
    if sum((value or NOTHING).size + 1 for value in values) < INLINE_BYTES:
        data = b"".join(_json_pieces(values))
        return Value("json", "list", len(data), data, length=len(values))
    path = write_pieces(_json_pieces(values), str(folder))
    with open(path, "rb") as file:
        preview = file.read(PREVIEW_CHARS).decode("utf-8", "ignore")
    return Value("json", "list", os.path.getsize(path), None, path, len(values), preview)


def _json_pieces(values: Sequence[Value | None]) -> Iterator[bytes]:
    """The list as JSON, in pieces: the whole list may be too large for memory."""
    yield b"["
    for number, value in enumerate(values):
        yield b"," * (number > 0) + (value or NOTHING).read()
    yield b"]"


def outcome_of(task: ForEach, value: Value | None) -> Outcome:
    """The outcome of a ForEach whose children have all ended."""
    outcomes = [child.outcome for child in task.children if child.outcome is not None]
    started = min((outcome.started for outcome in outcomes if outcome.started is not None), default=None)
    ended = max((outcome.ended for outcome in outcomes), default=time.time())
    unsuccessful: list[Task] = [child for child in task.children if child.state is not TaskState.DONE]
    if all(child.cause is Cause.SKIPPED for child in unsuccessful):
        if len(unsuccessful) == len(task.children) > 0 and _is_skipped_whole(task):
            return canceled(Cause.SKIPPED, unsuccessful[0].outcome.error if unsuccessful[0].outcome else "")
        return Outcome(state=TaskState.DONE, started=started, ended=ended, value=value)
    unsuccessful = [child for child in unsuccessful if child.cause is not Cause.SKIPPED]
    first = next((child for child in unsuccessful if child.state is TaskState.FAILED), unsuccessful[0])
    cause = first.cause or Cause.ERROR
    states = Counter(child.state.value for child in unsuccessful)
    counts = " and ".join(f"{count} {state}" for state, count in states.items())
    message = f"of {len(task.children)} tasks {counts}; {first.name}: {first.outcome.error if first.outcome else ''}"
    return Outcome(state=first.state, started=started, ended=ended, value=value, cause=cause, error=message)


def _is_skipped_whole(task: ForEach) -> bool:
    """Whether its children were skipped together, not each by a condition on its item."""
    return task.when is not None or any(source.cause is Cause.SKIPPED for source in task.sources())
