"""Serves many clients over HTTP, who share one set of sessions."""

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
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import Server, build_server, open_sessions
from rhapsody_mcp.serving.http.authorization import guard
from rhapsody_mcp.serving.http.listeners import Listener
from rhapsody_mcp.serving.http.tokens import TokenFile, Tokens, plain_token
from rhapsody_mcp.serving.http.uvicorn_protocol import connections
from rhapsody_mcp.serving.paths import Places
from rhapsody_mcp.settings import Settings

__all__ = ["checks", "run_web_server", "serve_http", "serve_listener", "stop_on_signal"]

_errors = logging.getLogger("uvicorn.error")
_SESSIONS = 1000
"""Clients of the revisions before 2026-07-28 that may be connected; each takes memory until it was idle for 30 min."""
_GRACE_S = 1
"""How long a stream that a client holds open may last once everything else has ended."""


async def serve_http(settings: Settings, listener: Listener, say: Callable[[str], None]) -> None:
    """Serve sessions of this process alone. Returns after SIGTERM or SIGINT, when nothing is left running; after
    SIGKILL the keepers of the engines see to that. Raises as `serve_listener`."""
    stop = anyio.Event()
    async with open_sessions(settings) as sessions, TasksExtension() as tasks, anyio.create_task_group() as group:
        await group.start(stop_on_signal, sessions, stop)
        with open_audit(Places().audit, settings) as audit:
            await serve_listener(settings, listener, sessions, tasks, say, stop, Places(), audit)
        group.cancel_scope.cancel()


async def serve_listener(
    settings: Settings,
    listener: Listener,
    sessions: SessionRegistry,
    tasks: TasksExtension,
    say: Callable[[str], None],
    stop: anyio.Event,
    places: Places,
    audit: Audit,
) -> None:
    """Serve these sessions at this listener until `stop`; the sessions go on. `say` is told the address, and of a
    first token that is made for it: nowhere else is that token to be read.

    Raises InvalidSettings where a token file cannot be used, or a name for the host is needed and is not there.
    """
    security = checks(listener, settings.http_allowed_hosts)
    file = TokenFile(places.tokens)
    plain = plain_token(settings.http_token_file) if settings.http_token_file else None
    first = None if listener.private or plain else file.create_first()
    if first is not None:
        audit.token("create", file.read()[-1].name)
    server = build_server(settings, sessions, [tasks], audit)
    reading = build_server(settings.model_copy(update={"read_only": True}), sessions, [tasks], audit)
    whole, part = (_app(one, security, settings) for one in (server, reading))
    writing = await _names(server) - await _names(reading)
    demanded = not listener.private or plain is not None
    app = guard(whole, part, writing, Tokens(file, plain), settings, audit, demanded=demanded)
    kind = connections(settings.http_slow_s, settings.http_connections)
    told = f"Listening on {listener.address}" + (f"\n{_about_token(first, settings)}" if demanded else "")
    try:
        async with reading.session_manager.run():
            await run_web_server(server, app, listener, stop, lambda: say(told), kind)
    finally:
        for one in (server, reading):
            one.leave()


def _about_token(first: str | None, settings: Settings) -> str:
    if settings.http_token_file is not None:
        return f"Bearer token: in {settings.http_token_file}, or one of `rhapsody-mcp token list`"
    if first is not None:
        return f"Bearer token, shown only now: {first}"
    return "Bearer token: one of `rhapsody-mcp token list`, or a new one of `rhapsody-mcp token create NAME`"


async def _names(server: Server) -> set[str]:
    return {tool.name for tool in await server.list_tools()}


def _app(server: Server, security: TransportSecuritySettings, settings: Settings) -> ASGIApp:
    return server.streamable_http_app(
        transport_security=security, max_request_body_size=settings.request_bytes, max_sessions=_SESSIONS
    )


def checks(listener: Listener, allowed_hosts: Sequence[str]) -> TransportSecuritySettings:
    """Which Host and Origin headers are taken: a page that a browser shows cannot reach us under a name of its own."""
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
    kind: type[asyncio.Protocol] | None = None,
) -> None:
    """Serve until `stop` is set, and those who are being served a moment longer."""
    web = _WebServer(
        uvicorn.Config(
            app,
            http=kind or connections(),  # of h11: httptools leaves the blanks at the end of a header's value in it
            lifespan="off",  # entered here, where it surrounds the stop
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
        group.start_soon(_end, web, stop)
        ready()
        try:
            await web.serve([listener.socket])
        finally:
            _errors.setLevel(logging.WARNING)
        group.cancel_scope.cancel()


async def _end(web: _WebServer, stop: anyio.Event) -> None:
    await stop.wait()
    _errors.setLevel(logging.CRITICAL)  # a traceback for each stream that ends now
    web.should_exit = True


async def stop_on_signal(
    sessions: SessionRegistry, stop: anyio.Event, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """The sessions are closed first, so that waiting calls are answered."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            await sessions.close_all()
            stop.set()


class _WebServer(uvicorn.Server):
    """Leaves the signals to us: uvicorn would raise them again once it has stopped, before the sessions are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
