"""What an HTTP listener that has ended leaves to the service that goes on: nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.protocol.audit import Audit
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.backend_factory import SessionConfig
from rhapsody_mcp.runtime.session_registry import SessionRegistry, Watcher
from rhapsody_mcp.server import open_sessions
from rhapsody_mcp.serving.http.listeners import listen_on_socket
from rhapsody_mcp.serving.http.server import serve_listener
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import Settings

pytestmark = pytest.mark.anyio


class Counted(SessionRegistry):
    """Knows how many watch it, and how many have ever done so."""

    now = ever = 0

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        leave = super().watch(watcher)
        self.now, self.ever = self.now + 1, self.ever + 1

        def left() -> None:
            leave()
            self.now -= 1

        return left


async def test_a_listener_that_has_ended_hears_no_more_of_the_sessions_and_silences_nothing(tmp_path: Path) -> None:
    stop = anyio.Event()
    with anyio.fail_after(600):
        async with Counted(lambda wanted: []) as sessions, TasksExtension() as tasks:
            with listen_on_socket(tmp_path / "socket") as listener:
                made = sessions, tasks, lambda words: stop.set(), stop, ServicePaths(tmp_path), Audit()
                await serve_listener(Settings(), listener, *made)
            assert sessions.ever and not sessions.now
    assert logging.getLogger("uvicorn.error").level == logging.WARNING


async def test_a_watcher_that_was_taken_off_hears_nothing() -> None:
    heard: list[str] = []
    async with open_sessions(Settings()) as sessions:
        leave = sessions.watch(lambda opened, task: heard.append("first"))
        sessions.watch(lambda opened, task: heard.append("second"))
        await sessions.open(SessionConfig(backends=("local",)))
        leave()
        await sessions.open(SessionConfig(backends=("local",)))
    assert heard[:3] == ["first", "second", "second"] and heard.count("first") == 1
