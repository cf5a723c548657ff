"""Serves many clients over HTTP, who share one set of sessions."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import anyio
import anyio.abc
import uvicorn
from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
from mcp.server.auth.middleware.bearer_auth import BearerAuthBackend, RequireAuthMiddleware
from mcp.server.transport_security import TransportSecuritySettings
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.types import ASGIApp

from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.open_sessions import OpenSessions
from rhapsody_mcp.runtime.opening import open_backends
from rhapsody_mcp.server import Server, build_server
from rhapsody_mcp.serving.listening import Listener
from rhapsody_mcp.serving.tokens import OneToken, read_or_make_token, token_file
from rhapsody_mcp.settings import Settings

__all__ = ["checks", "run_web_server", "serve_http"]

_GRACE_S = 1
"""How long a stream that a client holds open may last once everything else has ended."""


async def serve_http(settings: Settings, listener: Listener, say: Callable[[str], None]) -> None:
    """Returns after SIGTERM or SIGINT, when nothing is left running; after SIGKILL the keepers of the engines see to
    that. `say` is told the address and the token's file, never the token.

    Raises InvalidSettings where a token or a name for the host is needed and is not there.
    """
    security = checks(listener, settings.http_allowed_hosts)
    file = settings.http_token_file or (None if listener.private else token_file())
    token = read_or_make_token(file.expanduser()) if file else None
    tasks = TasksExtension()
    async with OpenSessions(partial(open_backends, settings=settings)) as sessions:
        server = build_server(settings, sessions, [tasks])
        app: ASGIApp = server.streamable_http_app(transport_security=security)
        told = f"Listening on {listener.address}" + (f"\nBearer token: in {file}" if file else "")
        async with tasks:
            await run_web_server(server, _guarded(app, token) if token else app, listener, sessions, lambda: say(told))


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


def _guarded(app: ASGIApp, token: str) -> ASGIApp:
    """The SDK's own checks of a bearer token, without the issuer that its settings ask for."""
    inner = AuthContextMiddleware(RequireAuthMiddleware(app, required_scopes=[]))
    return AuthenticationMiddleware(inner, backend=BearerAuthBackend(OneToken(token)))


async def run_web_server(
    server: Server, app: ASGIApp, listener: Listener, sessions: OpenSessions, ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; then close the sessions, so that waiting calls are answered, and stop."""
    web = _WebServer(
        uvicorn.Config(
            app,
            http="h11",  # httptools leaves the blanks at the end of a header's value in it
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
        await group.start(_stop_on_signal, web, sessions)
        ready()
        await web.serve([listener.socket])
        group.cancel_scope.cancel()


async def _stop_on_signal(
    web: _WebServer, sessions: OpenSessions, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            await sessions.close_all()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a traceback for each stream that ends now
            web.should_exit = True


class _WebServer(uvicorn.Server):
    """Leaves the signals to us: uvicorn would raise them again once it has stopped, before the sessions are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
