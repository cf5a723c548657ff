"""Tells which resources changed, and each of them not too often."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

from mcp.server.subscriptions import InMemorySubscriptionBus, ResourceUpdated

from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["ROOT", "Notices"]

ROOT = "rhapsody://sessions"
_LOGS = ("stdout", "stderr")


class Notices:
    """Publishes on `bus` that a resource changed: at once, and then at most once in `interval_s` for each resource.

    Only resources that somebody watches are told of; while nobody watches any, a change costs next to nothing.
    """

    def __init__(self, interval_s: float) -> None:
        self.bus = InMemorySubscriptionBus()
        self._interval_s = interval_s
        self._watchers: Counter[str] = Counter()
        self._changed: dict[tuple[str, Task | None], None] = {}
        self._telling: asyncio.Task[None] | None = None

    @property
    def watched(self) -> set[str]:
        return set(self._watchers)

    def watch(self, uri: str) -> None:
        self._watchers[uri] += 1

    def unwatch(self, uri: str) -> None:
        """As often as it was watched."""
        self._watchers[uri] -= 1
        if not self._watchers[uri]:
            del self._watchers[uri]

    def changed(self, session: OpenSession, task: Task | None) -> None:
        """A task of the session changed its state, or the session was opened or closed."""
        if self._watchers:
            self._changed[session.id, task] = None
            if self._telling is None:
                self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        """Ends when nothing has changed for `interval_s`."""
        try:
            while self._changed:
                changed, self._changed = self._changed, {}
                touched = (uri for session, task in changed for uri in _touched(session, task))
                for uri in dict.fromkeys(uri for uri in touched if uri in self._watchers):
                    await self.bus.publish(ResourceUpdated(uri))
                await asyncio.sleep(self._interval_s)
        finally:
            self._telling = None


def _touched(session: str, task: Task | None) -> Iterator[str]:
    """The addresses of all that shows a change."""
    home = f"{ROOT}/{session}"
    yield from (ROOT, home, f"{home}/statistics")
    if task is None:
        return
    for name in filter(None, (task.uid, task.name)):
        for spelled in (name, quote(name)) if "[" in name else (name,):  # as in sweep[3] and sweep%5B3%5D
            yield f"{home}/tasks/{spelled}"
            if task.state.final:
                yield from (f"{home}/tasks/{spelled}/{log}" for log in _LOGS)
