"""Reads what a running task has printed so far."""

from __future__ import annotations

import os

from rhapsody_mcp.engine.task.output_files import CURRENT_TASK, STREAMS, middle
from rhapsody_mcp.model.live.output import OutputPart, OutputQuery, Printed

__all__ = ["current_uid", "read_printed", "read_printed_in_worker"]


def read_printed(path: str, query: OutputQuery, limit: int | None) -> Printed | None:
    """Return a piece of the output of the supervisor with this path, of which `limit` bytes are kept; None if there is
    no output any more."""
    try:
        out, err = (
            _part(f"{path}.{suffix}", start, query.max_bytes, limit)
            for suffix, start in zip(STREAMS, query.starts, strict=True)
        )
    except FileNotFoundError:
        return None
    return out, err


def read_printed_in_worker(path: str, uid: str, query: OutputQuery, limit: int | None) -> Printed | None:
    """As `read_printed`, of the function that a worker runs; None if that is not the task `uid`."""
    if current_uid(path) != uid:
        return None
    printed = read_printed(path, query, limit)
    return printed if current_uid(path) == uid else None  # the next function truncates the files


def current_uid(path: str) -> str:
    """Return the uid of the function that the worker with this path has started last; empty before the first."""
    try:
        with open(f"{path}.{CURRENT_TASK}", "rb", buffering=0) as file:
            return file.read().partition(b"\0")[0].decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _part(path: str, start: int, max_bytes: int, limit: int | None) -> OutputPart:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        gap = middle(size, limit) if limit is not None and size > limit else (0, 0)
        start = min(start, size) if start >= 0 else max(0, size + start)
        if gap[0] <= start < gap[1]:
            start = gap[1]
        end = gap[0] if start < gap[0] else size
        return OutputPart(start, os.pread(file, min(max_bytes, end - start), start), size, gap)
    finally:
        os.close(file)
