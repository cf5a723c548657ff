"""Follows what tasks print, for people: the command `logs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread

from rhapsody_mcp.model.values import Stream, gap_note
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.toolsets.output.live import STREAMS, OutputReader
from rhapsody_mcp.toolsets.output.sources import OutputSource, sources_of

__all__ = ["follow"]

_LOOK_S = 0.5
_PIECE_BYTES = 64 * 1024


async def follow(session: Session, task: Task, rank: int | None, *, until_end: bool) -> AsyncIterator[tuple[str, str]]:
    """Yield what the task, its ranks, or the tasks of a for_each print, in pieces: the stream, and whole lines of text
    where the task runs. Where several print, each line is after the name of who printed it.

    Ends once all there is was given; with `until_end`, once the task has ended too.
    """
    followed: dict[tuple[str, int], _Followed] = {}
    while True:
        has_ended, given = task.state.final, False
        for source in sources_of(task, rank):
            one = followed.setdefault((source.task.uid, source.rank), _Followed(session, source))
            async for stream, text in one.new_lines():
                given = True
                yield stream, text
        if not given and (has_ended or not until_end):
            return
        if not given:
            await asyncio.sleep(_LOOK_S)


class _Followed:
    """One source, and what of its output was given."""

    def __init__(self, session: Session, source: OutputSource) -> None:
        self._source, self._reader = source, OutputReader(session, source.task, source.rank)
        self._rests = [b"", b""]
        self._is_done = False

    async def new_lines(self) -> AsyncIterator[tuple[str, str]]:
        if self._is_done:
            return
        if self._source.task.outcome is None:
            for index, data in enumerate(await self._reader.read(_PIECE_BYTES) or ()):
                if text := self._lines(index, data):
                    yield STREAMS[index], text
            return
        self._is_done = True
        outcome = self._source.task.outcome
        source = outcome.ranks[self._source.rank] if self._source.rank < len(outcome.ranks) else outcome
        for index, (name, read) in enumerate(zip(STREAMS, self._reader.ends, strict=True)):
            async for data in _rest_of(getattr(source, name), read):
                if text := self._lines(index, data):
                    yield name, text
            if text := self._lines(index, b"", is_last=True):
                yield name, text

    def _lines(self, index: int, data: bytes, *, is_last: bool = False) -> str:
        """The whole lines, and at the end the last line too."""
        data = self._rests[index] + data
        end = len(data) if is_last or len(data) > _PIECE_BYTES else data.rfind(b"\n") + 1
        self._rests[index] = data[end:]
        text, label = data[:end].decode("utf-8", "replace"), self._source.label
        return "".join(f"{label} {line}\n" for line in text.splitlines()) if label else text


async def _rest_of(stream: Stream, read: int) -> AsyncIterator[bytes]:
    """Yield what follows the bytes that were read while the task ran, in pieces."""
    at = _position(stream, read)
    try:
        while data := await anyio.to_thread.run_sync(_piece, stream, at):
            at += len(data)
            yield data
    except OSError:
        yield f"[its file, {stream.file}, is gone]\n{stream.text}".encode()


def _position(stream: Stream, read: int) -> int:
    """Where the output that was kept goes on after `read` bytes of the whole."""
    if not stream.left_out:
        return read
    note = gap_note(stream.left_out)
    gap = stream.text.encode().find(note) if stream.file is None else (stream.size - len(note)) // 2
    if read < gap + stream.left_out:
        return min(read, gap)
    return read - stream.left_out + len(note)


def _piece(stream: Stream, start: int) -> bytes:
    if stream.file is None:
        return stream.text.encode()[start:]
    with Path(stream.file).open("rb") as file:
        file.seek(start)
        return file.read(_PIECE_BYTES)
