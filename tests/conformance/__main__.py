"""The real server over HTTP, on a scripted backend, with what the conformance suite needs added to it."""

from __future__ import annotations

import warnings
from functools import partial

import anyio
from mcp.shared.exceptions import MCPDeprecationWarning

from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import build_server
from rhapsody_mcp.serving.http.listeners import Listener, listen_on_host
from rhapsody_mcp.serving.http.server import host_checks, run_web_server, stop_on_signal
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import perform
from tests.conformance.asking_fixture import add_asking
from tests.conformance.content_fixture import add_content
from tests.conformance.tasks_fixture import add_task_tools


async def serve(listener: Listener) -> None:
    async with SessionRegistry(lambda _: [ScriptedBackend(perform)]) as sessions, TasksExtension() as tasks:
        server = build_server(Settings(), sessions, [tasks])
        add_content(server)
        add_asking(server)
        add_task_tools(server)
        app = server.streamable_http_app(transport_security=host_checks(listener, ()))
        stop = anyio.Event()
        async with anyio.create_task_group() as group:
            await group.start(stop_on_signal, sessions, stop)
            await run_web_server(server, app, listener, stop, partial(print, listener.address, flush=True))
            group.cancel_scope.cancel()


if __name__ == "__main__":
    warnings.simplefilter("ignore", MCPDeprecationWarning)  # the suite asks for what the protocol has deprecated
    with listen_on_host("127.0.0.1", 0) as listener:
        anyio.run(serve, listener)
