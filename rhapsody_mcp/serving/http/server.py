"""Serves MCP over HTTP to many clients, which share one set of sessions."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import anyio
import anyio.abc
import uvicorn
from mcp.server.transport_security import TransportSecuritySettings
from starlette.types import ASGIApp

from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.protocol.audit import Audit, open_audit
from rhapsody_mcp.protocol.dashboard import Dashboard
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import Server, build_server, open_sessions
from rhapsody_mcp.serving.http.authorization import authorized_app
from rhapsody_mcp.serving.http.dashboard import PageData, PageFile
from rhapsody_mcp.serving.http.listeners import Listener
from rhapsody_mcp.serving.http.tokens import TokenFile, TokenVerifier, read_plain_token
from rhapsody_mcp.serving.http.uvicorn_protocol import connection_class
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import Settings

__all__ = ["host_checks", "run_web_server", "serve_http", "serve_listener", "stop_on_signal"]

_uvicorn_log = logging.getLogger("uvicorn.error")
_MAX_SESSIONS = 1000
"""MCP sessions of protocol revisions before 2026-07-28; each takes memory until it was idle for 30 min."""
_GRACE_S = 1
"""How long open streams may last once all other requests have ended."""


async def serve_http(settings: Settings, listener: Listener, say: Callable[[str], None]) -> None:
    """Serve with sessions of this process alone. Returns after SIGTERM or SIGINT, when nothing is left running; after
    SIGKILL the keepers end the engines. Raises as `serve_listener`."""
    stop = anyio.Event()
    async with open_sessions(settings) as sessions, TasksExtension() as tasks, anyio.create_task_group() as group:
        await group.start(stop_on_signal, sessions, stop)
        paths = ServicePaths()
        with open_audit(paths.audit, settings) as audit:
            await serve_listener(settings, listener, sessions, tasks, say, stop, paths, audit)
        group.cancel_scope.cancel()


async def serve_listener(
    settings: Settings,
    listener: Listener,
    sessions: SessionRegistry,
    tasks: TasksExtension,
    say: Callable[[str], None],
    stop: anyio.Event,
    paths: ServicePaths,
    audit: Audit,
) -> None:
    """Serve these sessions at this listener until `stop`; the sessions stay open. `say` gets the address, and the
    first token where one is made: the token is shown nowhere else.

    Raises InvalidSettings where a token file cannot be used, or the listener needs a host name and has none.
    """
    checks = host_checks(listener, settings.http_allowed_hosts)
    file = TokenFile(paths.tokens)
    plain_token = read_plain_token(settings.http_token_file) if settings.http_token_file else None
    first_token = None if listener.private or plain_token else file.create_first()
    if first_token is not None:
        audit.token("create", file.read()[-1].name)
    server = build_server(settings, sessions, [tasks], audit)
    read_only_server = build_server(settings.model_copy(update={"read_only": True}), sessions, [tasks], audit)
    dashboard = Dashboard(sessions)
    full_app, read_only_app = (
        PageData(_app(one, checks, settings), dashboard, checks, audit, may_cancel=may_cancel)
        for one, may_cancel in ((server, not settings.read_only), (read_only_server, False))
    )
    withheld_tools = await _tool_names(server) - await _tool_names(read_only_server)
    token_required = not listener.private or plain_token is not None
    verifier = TokenVerifier(file, plain_token)
    app = authorized_app(
        full_app, read_only_app, withheld_tools, verifier, settings, audit, token_required=token_required
    )
    protocol = connection_class(settings.http_slow_s, settings.http_connections)
    greeting = f"Listening on {listener.address}"
    if token_required:
        greeting += f"\n{_token_hint(first_token, settings)}"
    try:
        async with read_only_server.session_manager.run():
            await run_web_server(server, PageFile(app, checks), listener, stop, lambda: say(greeting), protocol)
    finally:
        for one in (server, read_only_server):
            one.detach()


def _token_hint(first_token: str | None, settings: Settings) -> str:
    if settings.http_token_file is not None:
        return f"Bearer token: in {settings.http_token_file}, or one of `rhapsody-mcp token list`"
    if first_token is not None:
        return f"Bearer token, shown only now: {first_token}"
    return "Bearer token: one of `rhapsody-mcp token list`, or a new one of `rhapsody-mcp token create NAME`"


async def _tool_names(server: Server) -> set[str]:
    return {tool.name for tool in await server.list_tools()}


def _app(server: Server, checks: TransportSecuritySettings, settings: Settings) -> ASGIApp:
    return server.streamable_http_app(
        transport_security=checks, max_request_body_size=settings.request_bytes, max_sessions=_MAX_SESSIONS
    )


def host_checks(listener: Listener, allowed_hosts: Sequence[str]) -> TransportSecuritySettings:
    """The accepted Host and Origin headers, against DNS rebinding: a web page cannot reach the server under its own
    host name. Raises InvalidSettings."""
    for host in allowed_hosts:
        if "/" in host or not host:
            raise InvalidSettings(
                f"the allowed host {host!r} is no host name. Valid: a name or an address, as in node1."
            )
    names = [
        f"[{name}]" if name.count(":") > 1 and name[0] != "[" else name for name in (*listener.names, *allowed_hosts)
    ]
    if not names:
        raise InvalidSettings(
            f"{listener.address} stands for every address of this machine. Say under which names clients call it: "
            "--allowed-host NAME, once for each."
        )
    hosts = [pattern for name in dict.fromkeys(names) for pattern in (name, f"{name}:*")]
    origins = [f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts]
    return TransportSecuritySettings(allowed_hosts=hosts, allowed_origins=origins)


async def run_web_server(
    server: Server,
    app: ASGIApp,
    listener: Listener,
    stop: anyio.Event,
    ready: Callable[[], None],
    protocol: type[asyncio.Protocol] | None = None,
) -> None:
    """Serve until `stop` is set; open requests then have a moment to end."""
    web = _WebServer(
        uvicorn.Config(
            app,
            http=protocol or connection_class(),  # of h11: httptools keeps trailing blanks of header values
            lifespan="off",  # the session manager is entered below
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    async with server.session_manager.run(), anyio.create_task_group() as group:
        group.start_soon(_exit_on_stop, web, stop)
        ready()
        try:
            await web.serve([listener.socket])
        finally:
            _uvicorn_log.setLevel(logging.WARNING)
        group.cancel_scope.cancel()


async def _exit_on_stop(web: _WebServer, stop: anyio.Event) -> None:
    await stop.wait()
    _uvicorn_log.setLevel(logging.CRITICAL)  # hides a traceback for each stream that ends now
    web.should_exit = True


async def stop_on_signal(
    sessions: SessionRegistry, stop: anyio.Event, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Closes the sessions before it sets `stop`, so that waiting calls are answered."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            await sessions.close_all()
            stop.set()


class _WebServer(uvicorn.Server):
    """Without uvicorn's signal handlers, which raise the signal again before the sessions are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
