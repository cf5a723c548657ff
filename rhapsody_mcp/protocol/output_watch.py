"""Notices that the output of a running task grows, while somebody watches it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from mcp.shared.uri_template import UriTemplate

from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.live.output import OutputQuery
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.protocol.resource_updates import LOGS, TASK_URI, ResourceUpdates
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.toolsets.output.sources import sources_of

__all__ = ["OutputWatch"]

_LOOK_S = 0.5
_TEMPLATES = [UriTemplate.parse(f"{TASK_URI}/{log}") for log in LOGS]

_Sizes = dict[tuple[str, int, int], int]
"""Bytes by task, rank and attempt."""


class OutputWatch:
    """Looks at each watched output twice a second, while any is watched."""

    def __init__(self, sessions: SessionRegistry, updates: ResourceUpdates) -> None:
        self._sessions, self._updates = sessions, updates
        self._sizes: dict[str, _Sizes] = {}
        self._looking: asyncio.Task[None] | None = None
        updates.on_watch = self._wake

    def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _wake(self) -> None:
        if self._looking is None and self._watched():
            self._looking = asyncio.create_task(self._look())

    def _watched(self) -> list[str]:
        return [uri for uri in self._updates.watched if uri.endswith(LOGS)]

    async def _look(self) -> None:
        try:
            while uris := self._watched():
                self._sizes = {uri: self._sizes.get(uri, {}) for uri in uris}
                for uri in uris:
                    sizes = await self._sizes_in(uri, self._sizes[uri])
                    if any(size > self._sizes[uri].get(attempt, 0) for attempt, size in sizes.items()):
                        self._updates.note_growth(uri)
                    self._sizes[uri] = sizes
                await asyncio.sleep(_LOOK_S)
        finally:
            self._looking = None

    async def _sizes_in(self, uri: str, earlier: _Sizes) -> _Sizes:
        """The bytes that running tasks and ranks have printed into this output so far; of who does not answer, those
        known earlier."""
        sizes: _Sizes = {}
        for stream, template in enumerate(_TEMPLATES):
            if names := template.match(uri):
                with suppress(RhapsodyError):
                    sizes |= await self._sizes_of(str(names["session"]), str(names["task"]), stream, earlier)
        return sizes

    async def _sizes_of(self, session: str, name: str, stream: int, earlier: _Sizes) -> _Sizes:
        opened, sizes = self._sessions.get(session), _Sizes()
        for task, rank, _ in sources_of(opened.task(name)):
            if task.state is TaskState.RUNNING:
                attempt = (task.uid, rank, task.attempts)
                printed = await opened.session.read_output(task, OutputQuery(max_bytes=0, rank=rank))
                sizes[attempt] = earlier.get(attempt, 0) if printed is None else printed[stream].size
        return sizes
