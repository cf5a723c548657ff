"""Serves one client on stdin and stdout, and stops everything that it started when the client leaves."""

from __future__ import annotations

import logging
import os
import signal
from functools import partial

import anyio
from anyio.abc import TaskGroup
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage

from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.open_sessions import OpenSessions
from rhapsody_mcp.runtime.opening import open_backends
from rhapsody_mcp.server import Server, build_server
from rhapsody_mcp.serving.unreadable import answer_unreadable
from rhapsody_mcp.settings import Settings

__all__ = ["serve_stdio"]


async def serve_stdio(settings: Settings) -> None:
    """Returns at the end of stdin, when nothing is left running. SIGTERM and SIGINT end the process in that state;
    after SIGKILL the keepers of the engines do the same."""
    tasks = TasksExtension()
    async with OpenSessions(partial(open_backends, settings=settings)) as sessions:
        server = build_server(settings, sessions, [tasks])
        async with tasks, anyio.create_task_group() as group:
            await group.start(_stop_on_signal, sessions)
            await _serve(server, group)
            await sessions.close_all()
            group.cancel_scope.cancel()


async def _serve(server: Server, group: TaskGroup) -> None:
    lowlevel = server._lowlevel_server  # the SDK's own run_stdio_async leaves no place between it and the streams
    heard, readable = anyio.create_memory_object_stream[SessionMessage](0)
    async with stdio_server() as (read, write):
        group.start_soon(answer_unreadable, read, heard, write)
        await lowlevel.run(readable, write, lowlevel.create_initialization_options())


async def _stop_on_signal(
    sessions: OpenSessions, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            await sessions.close_all()
            logging.shutdown()
            os._exit(128 + number)  # the thread that reads stdin cannot be interrupted
