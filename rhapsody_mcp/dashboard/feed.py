"""Pushes what changes in a session to the pages that show it: made once for all pages, at most twice a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from rhapsody_mcp.dashboard.view import SessionView

__all__ = ["Cursor", "Feed"]

_INTERVAL_S = 0.5
_MOST_LOAD = 20
"""A look is followed by a pause of so many times what it took, so that looking takes 5 % of a core at most."""
_HEARTBEAT_S = 15.0
"""How long a page waits at most for a frame that says that nothing has changed."""
_MAX_ROWS = 100_000
"""A page that opens gets so many of the newest rows; the older ones come when it asks for them."""


class Cursor(NamedTuple):
    """What a page has: rows, lanes and groups of the spans of an epoch."""

    epoch: int = -1
    rows: int = 0
    lanes: int = 0
    groups: int = 0

    @classmethod
    def read(cls, text: str) -> Cursor:
        """The cursor of a frame; of anything else, that of a page that has nothing."""
        numbers = text.split(".")
        if len(numbers) == len(cls._fields) and all(number.isdecimal() for number in numbers):
            return cls(*(int(number[:15]) for number in numbers))
        return cls()

    def __str__(self) -> str:
        return ".".join(map(str, self))


class Feed:
    """The frames of one session. Nothing is collected while no page waits for a frame."""

    def __init__(self, view: SessionView, more: Callable[[], dict[str, Any]] = dict) -> None:
        """`more` gives further fields of each frame."""
        self.view, self._more = view, more
        self._head = b"{}"
        self._compared: dict[str, Any] = {}
        self._version = 0
        self._looked_at, self._pause_s = 0.0, 0.0
        self._look: asyncio.Task[None] | None = None
        self._blocks: dict[tuple[Cursor, Cursor], bytes] = {}

    async def next_frame(self, cursor: Cursor, seen: int, wait_s: float = _HEARTBEAT_S) -> tuple[bytes, Cursor, int]:
        """The next frame as JSON after the version `seen`, with the page's cursor and version then. Where nothing
        changes for `wait_s`, the frame says so."""
        parts, end, version = await self._next_parts(cursor, seen, wait_s)
        return b"".join(parts), end, version

    async def _next_parts(self, cursor: Cursor, seen: int, wait_s: float) -> tuple[Sequence[bytes], Cursor, int]:
        """As `next_frame`, in parts, of which the long ones are shared by all pages."""
        until = time.monotonic() + wait_s
        while True:
            await self._look_once()
            if self._version != seen or time.monotonic() >= until:
                break
        end = self._end()
        parts = (
            b'{"cursor":"',
            str(end).encode(),
            b'","block":',
            self._block(cursor, end),
            b',"head":',
            self._head,
            b"}",
        )
        return parts, end, self._version

    async def frames(self, cursor: Cursor) -> AsyncIterator[Sequence[bytes]]:
        """Frames, each in parts, for as long as they are read, until the session is closed."""
        version = -1
        while not (version >= 0 and self.view.session.closed):
            parts, cursor, version = await self._next_parts(cursor, version, _HEARTBEAT_S)
            yield parts

    async def _look_once(self) -> None:
        """Wait until the next look is due, and have it; one look serves everyone who waits."""
        if self._look is None:
            self._look = asyncio.create_task(self._look_when_due())
        await asyncio.shield(self._look)

    async def _look_when_due(self) -> None:
        try:
            await asyncio.sleep(self._looked_at + self._pause_s - time.monotonic())
            began = time.monotonic()
            await self.view.catch_up()
            self._take_head()
            self._looked_at = time.monotonic()
            self._pause_s = max(_INTERVAL_S, _MOST_LOAD * (self._looked_at - began))
        finally:
            self._look = None

    def _take_head(self) -> None:
        head = self.view.head() | self._more()
        compared = {**head, "now": 0, "end": self._end()}
        if compared != self._compared:
            self._version += 1
            self._compared = compared
            self._blocks.clear()
        self._head = msgspec.json.encode(head)

    def _end(self) -> Cursor:
        spans = self.view.spans
        return Cursor(self.view.epoch, len(spans), len(spans.lanes), len(spans.groups))

    def _block(self, start: Cursor, end: Cursor) -> bytes:
        """What a page lacks, as JSON."""
        if start.epoch != end.epoch or any(had > have for had, have in zip(start, end, strict=True)):
            start = Cursor(end.epoch, max(0, end.rows - _MAX_ROWS))
        if (start, end) not in self._blocks:
            block = self.view.spans.since(start.rows, start.lanes, start.groups)
            self._blocks[start, end] = msgspec.json.encode(block)
        return self._blocks[start, end]
