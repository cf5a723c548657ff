"""Lets in those who may call over HTTP, each to what they may call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection

from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, BearerAuthBackend
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rhapsody_mcp.protocol.audit import Audit
from rhapsody_mcp.serving.http.limits import BodyLimit, Buckets, RateLimit, SendLimit, caller_of, header, refuse
from rhapsody_mcp.serving.http.tokens import Tokens
from rhapsody_mcp.serving.peer_credentials import Peer
from rhapsody_mcp.settings import Settings

__all__ = ["guard"]

_RECORDED = {401, 403, 408, 413, 421, 429, 503}
"""What is refused before it is a call: those are recorded where they are made."""
_MAKE_ONE = "make one with: rhapsody-mcp token create NAME"


def guard(
    everything: ASGIApp,
    reading: ASGIApp,
    withheld: Collection[str],
    tokens: Tokens,
    settings: Settings,
    audit: Audit,
    *,
    demanded: bool,
) -> ASGIApp:
    """An application for `run_web_server` that lets through whom it may.

    A token with the scope `run` leads to `everything`, one with `read` alone to `reading`, which does not offer the
    tools that are `withheld`. Who sends no token is let in to everything where it is not `demanded` and the
    operating system says that it is the same user.
    """

    def valid(scope: Scope) -> bool:
        user = scope.get("user")
        return not isinstance(user, AuthenticatedUser) or tokens.find(user.access_token.token) is not None

    def bounded(app: ASGIApp) -> ASGIApp:
        return BodyLimit(AuthContextMiddleware(app), settings.request_bytes, settings.http_slow_s)

    admission = _Admission(bounded(everything), bounded(_Reading(reading, withheld)), demanded)
    limited = RateLimit(SendLimit(admission, valid), settings.http_requests_per_s, settings.http_connections // 2)
    recorded = _Recorded(limited, audit)
    return AuthenticationMiddleware(recorded, backend=BearerAuthBackend(tokens))


class _Admission:
    def __init__(self, everything: ASGIApp, reading: ASGIApp, demanded: bool) -> None:
        self._everything, self._reading, self._demanded = everything, reading, demanded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user, peer = scope.get("user"), scope["state"]["peer"]
        assert isinstance(peer, Peer)
        if isinstance(user, AuthenticatedUser):
            chosen = self._everything if "run" in user.scopes else self._reading
        elif self._demanded or header(scope, b"authorization") is not None or not peer.is_us:
            chosen = _refuse_caller
        else:
            chosen = self._everything
        await chosen(scope, receive, send)


async def _refuse_caller(scope: Scope, receive: Receive, send: Send) -> None:
    """One text for every token that is not taken: whoever guesses learns nothing of those that there are."""
    if header(scope, b"authorization") is None:
        words, told = f"a bearer token is needed; {_MAKE_ONE}", 'Bearer realm="rhapsody-mcp"'
    else:
        words = f"the token is not known here, was revoked or has expired; {_MAKE_ONE}"
        told = f'Bearer realm="rhapsody-mcp", error="invalid_token", error_description="{words}"'
    await refuse(send, 401, words, www_authenticate=told)


class _Reading:
    """Answers calls that need the scope `run` as MCP's authorization asks; the server behind it has no such tool."""

    def __init__(self, app: ASGIApp, withheld: Collection[str]) -> None:
        self._app, self._withheld = app, withheld

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = await receive()
        asked = _object(whole.get("body", b""))
        params = asked.get("params")
        name = params.get("name") if isinstance(params, dict) else None
        if asked.get("method") == "tools/call" and isinstance(name, str) and name in self._withheld:
            told = 'Bearer error="insufficient_scope", scope="run", error_description="this token may only read"'
            words = f"{name} needs a token with the scope run; this one may only read."
            await refuse(send, 403, words, id=asked.get("id"), www_authenticate=told)
            return
        messages = [whole]

        async def next_message() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, next_message, send)


def _object(body: bytes) -> dict[str, object]:
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


class _Recorded:
    """Writes down what is refused before it is a call. Of a flood of one caller, one in a while, with how many."""

    def __init__(self, app: ASGIApp, audit: Audit) -> None:
        self._app, self._audit = app, audit
        self._room = Buckets(per_s=0.1, most=20)
        self._unsaid: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in _RECORDED:
                self._record(scope, message["status"])
            await send(message)

        await self._app(scope, receive, heard)

    def _record(self, scope: Scope, status: int) -> None:
        caller = caller_of(scope)
        if self._room.take(caller):
            self._unsaid[caller] += 1
            return
        asked = f"{scope['method']} {scope['path']}"
        more = {"unsaid_before": before} if (before := self._unsaid.pop(caller, 0)) else {}
        self._audit.refused(caller, str(scope["state"]["peer"]), asked, status, **more)
