"""Publishes updates of resources, at a limited rate for each resource."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import quote

from mcp.server.subscriptions import InMemorySubscriptionBus, ResourceUpdated

from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["LOGS", "SESSIONS_URI", "TASK_URI", "ResourceUpdates"]

SESSIONS_URI = "rhapsody://sessions"
TASK_URI = f"{SESSIONS_URI}/{{session}}/tasks/{{task}}"
"""A template, to which the name of a log is added."""
LOGS = ("stdout", "stderr")
_AT_THE_END = (*LOGS, "result")


class ResourceUpdates:
    """Publishes an update on `bus` at a resource's first change, and then at most once in `interval_s`.

    Only watched resources are published; without watchers a change costs next to nothing.
    """

    def __init__(self, interval_s: float) -> None:
        self.bus = InMemorySubscriptionBus()
        self._interval_s = interval_s
        self._watchers: Counter[str] = Counter()
        self._changed: dict[tuple[str, Task | None], None] = {}
        self._grown: dict[str, None] = {}
        self.on_watch: Callable[[], object] = lambda: None
        """Called when a resource is watched."""
        self._publishing: asyncio.Task[None] | None = None

    @property
    def watched(self) -> set[str]:
        return set(self._watchers)

    def watch(self, uri: str) -> None:
        self._watchers[uri] += 1
        self.on_watch()

    def unwatch(self, uri: str) -> None:
        """Undo one `watch`."""
        self._watchers[uri] -= 1
        if not self._watchers[uri]:
            del self._watchers[uri]

    def note_change(self, session: OpenSession, task: Task | None) -> None:
        """A task of the session changed its state or told its progress; or, with no task, the session was opened or
        closed."""
        if self._watchers:
            self._changed[session.id, task] = None
            self._begin_publishing()

    def note_growth(self, uri: str) -> None:
        """The output with this URI has grown."""
        self._grown[uri] = None
        self._begin_publishing()

    def _begin_publishing(self) -> None:
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish())

    async def _publish(self) -> None:
        """Returns when nothing has changed for `interval_s`."""
        try:
            while self._changed or self._grown:
                changed, self._changed = self._changed, {}
                grown, self._grown = self._grown, {}
                uris = [*grown, *(uri for session, task in changed for uri in _uris_of(session, task))]
                for uri in dict.fromkeys(uri for uri in uris if uri in self._watchers):
                    await self.bus.publish(ResourceUpdated(uri))
                await asyncio.sleep(self._interval_s)
        finally:
            self._publishing = None


def _uris_of(session: str, task: Task | None) -> Iterator[str]:
    """The URIs of all resources that show the change."""
    home = f"{SESSIONS_URI}/{session}"
    yield from (SESSIONS_URI, home, f"{home}/statistics")
    if task is None:
        return
    for name in filter(None, (task.uid, task.name)):
        for spelled in (name, quote(name)) if "[" in name else (name,):  # as in sweep[3] and sweep%5B3%5D
            yield f"{home}/tasks/{spelled}"
            if task.state.final:
                yield from (f"{home}/tasks/{spelled}/{part}" for part in _AT_THE_END)
