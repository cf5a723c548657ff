"""Serves one MCP client on stdin and stdout, with sessions that end when the client leaves."""

from __future__ import annotations

import logging
import os
import signal

import anyio
import anyio.abc

from rhapsody_mcp.protocol.audit import open_audit
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import build_server, open_sessions
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.serving.stdio.stdin import StdinStream
from rhapsody_mcp.serving.stream_server import LineStream, serve_client
from rhapsody_mcp.serving.telemetry import end_telemetry
from rhapsody_mcp.settings import Settings

__all__ = ["serve_stdio"]


async def serve_stdio(settings: Settings) -> None:
    """Returns at the end of stdin, when nothing is left running. SIGTERM and SIGINT end the process after the same
    cleanup; after SIGKILL the keepers of the engines clean up."""
    async with open_sessions(settings) as sessions, TasksExtension() as tasks, anyio.create_task_group() as group:
        await group.start(_stop_on_signal, sessions)
        with open_audit(ServicePaths().audit, settings) as audit:
            async with StdinStream() as stdin:
                requests = LineStream(stdin, settings.request_bytes)
                await serve_client(build_server(settings, sessions, [tasks], audit), requests, None)
        await sessions.close_all()
        group.cancel_scope.cancel()


async def _stop_on_signal(
    sessions: SessionRegistry, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            await sessions.close_all()
            end_telemetry()
            logging.shutdown()
            os._exit(128 + number)  # the thread that reads stdin cannot be interrupted
