"""Follows what tasks print, for people: the command `logs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.toolsets.output.feed import OutputFeed
from rhapsody_mcp.toolsets.output.live import STREAMS
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
            key = (source.task.uid, source.rank)
            if (one := followed.get(key)) is None:
                one = followed[key] = _Followed(session, source)
            if one.feed.is_over:
                continue
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
        self.feed = OutputFeed(session, source.task, source.rank)
        self._label = source.label
        self._rests = ["", ""]

    async def new_lines(self) -> AsyncIterator[tuple[str, str]]:
        async for index, piece in self.feed.pieces(_PIECE_BYTES):
            if text := self._lines(index, piece):
                yield STREAMS[index], text
        for index, name in enumerate(STREAMS):
            if self.feed.is_over and (text := self._lines(index, "", is_last=True)):
                yield name, text

    def _lines(self, index: int, piece: str, *, is_last: bool = False) -> str:
        """The whole lines, and at the end the last line too."""
        text = self._rests[index] + piece
        end = len(text) if is_last or len(text) > _PIECE_BYTES else text.rfind("\n") + 1
        self._rests[index], text = text[end:], text[:end]
        return "".join(f"{self._label} {line}\n" for line in text.splitlines()) if self._label else text
