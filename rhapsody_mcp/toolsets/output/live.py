"""Excerpts of what running tasks have printed so far."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import anyio.to_thread

from rhapsody_mcp.model.live.output import OutputPart, OutputQuery
from rhapsody_mcp.model.values import Stream, gap_note
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.toolsets.output.excerpts import SEARCHED_BYTES, Excerpt, OutputEnd, read_excerpt

__all__ = ["STREAMS", "OutputReader", "live_excerpts"]

STREAMS = ("stdout", "stderr")
_PIECE_BYTES = 1024 * 1024


async def live_excerpts(
    session: Session, task: Task, rank: int, end: OutputEnd, search: str | None, max_bytes: int
) -> dict[str, Excerpt] | None:
    """One end of stdout and stderr, or the lines that a search finds; None where the task does not run any more."""
    if search is not None:
        return await _search(session, task, rank, search, max_bytes)
    start = -max_bytes if end == "tail" else 0
    printed = await session.read_output(task, OutputQuery((start, start), max_bytes, rank))
    return printed and {name: _excerpt(part, end) for name, part in zip(STREAMS, printed, strict=True)}


def _excerpt(part: OutputPart, end: OutputEnd) -> Excerpt:
    return Excerpt(end, part.data.decode("utf-8", "replace"), part.size, left_out=part.size - len(part.data))


async def _search(session: Session, task: Task, rank: int, search: str, max_bytes: int) -> dict[str, Excerpt] | None:
    reader = OutputReader(session, task, rank)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in STREAMS]
        size = 0
        while (new := await reader.read(_PIECE_BYTES)) is not None and any(new) and size < SEARCHED_BYTES:
            size += sum(map(len, new))
            for file, data in zip(files, new, strict=True):
                await anyio.to_thread.run_sync(_append, file, data)
        if new is None and not size:
            return None
        streams = [Stream(file=str(file), size=end) for file, end in zip(files, reader.ends, strict=True)]
        return {
            name: await read_excerpt(stream, "tail", search, max_bytes)
            for name, stream in zip(STREAMS, streams, strict=True)
        }


def _append(file: Path, data: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(data)


class _Ends(NamedTuple):
    stdout: int = 0
    stderr: int = 0


class OutputReader:
    """Reads what a rank of a running task prints in this attempt, each byte once.

    Of an output over the limit, what is not kept is left out, with a line that says so.
    """

    def __init__(self, session: Session, task: Task, rank: int = 0) -> None:
        self._session, self._task, self._rank = session, task, rank
        self._attempt, self._has_shrunk = task.attempts, False
        self.ends = _Ends()
        """How many bytes of each stream were read or left out."""

    @property
    def is_outdated(self) -> bool:
        """Whether the task was started anew, so that its output begins at its first byte again."""
        return self._has_shrunk or self._task.attempts != self._attempt

    async def read(self, max_bytes: int) -> tuple[bytes, bytes] | None:
        """What is new in stdout and stderr, at most so many bytes of each; None where there is nothing any more."""
        printed = await self._session.read_output(self._task, OutputQuery(self.ends, max_bytes, self._rank))
        if printed is None:
            return None
        shrunk = [part.size for part, end in zip(printed, self.ends, strict=True) if part.size < end]
        self._has_shrunk = any(shrunk)  # to nothing: the worker has handed the output over, as the function has ended
        if shrunk or self.is_outdated:
            return None
        out, err = (_with_gap(part, end) for part, end in zip(printed, self.ends, strict=True))
        self.ends = _Ends(printed[0].end, printed[1].end)
        return out, err


def _with_gap(part: OutputPart, read: int) -> bytes:
    if part.start <= read:
        return part.data
    return gap_note(part.start - read) + part.data
