"""Authorizes HTTP requests by the scopes of their bearer tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection

from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, BearerAuthBackend
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rhapsody_mcp.protocol.audit import Audit
from rhapsody_mcp.serving.http.limits import (
    BodyLimit,
    RateLimit,
    SendLimit,
    TokenBuckets,
    caller_name,
    header,
    replay_body,
    send_error,
)
from rhapsody_mcp.serving.http.tokens import TokenVerifier
from rhapsody_mcp.serving.peer_credentials import Peer
from rhapsody_mcp.settings import Settings

__all__ = ["authorized_app"]

_AUDITED_STATUSES = {401, 403, 408, 413, 421, 429, 503}
"""Requests that are refused with these never become calls, so that the audit of calls does not record them."""
_ADVICE = "make one with: rhapsody-mcp token create NAME"


def authorized_app(
    full_app: ASGIApp,
    read_only_app: ASGIApp,
    withheld_tools: Collection[str],
    verifier: TokenVerifier,
    settings: Settings,
    audit: Audit,
    *,
    token_required: bool,
) -> ASGIApp:
    """An application for `run_web_server` that routes each request by its token.

    A token with the scope `run` gives access to `full_app`; one with `read` alone to `read_only_app`, which lacks the
    `withheld_tools`. Without `token_required`, a client without a token has access to `full_app` if the operating
    system says that the client is the same user.
    """

    def is_valid(scope: Scope) -> bool:
        user = scope.get("user")
        return not isinstance(user, AuthenticatedUser) or verifier.find(user.access_token.token) is not None

    def limited(app: ASGIApp) -> ASGIApp:
        return BodyLimit(AuthContextMiddleware(app), settings.request_bytes, settings.http_slow_s)

    router = _ScopeRouter(limited(full_app), limited(_ScopeChallenge(read_only_app, withheld_tools)), token_required)
    rate_limited = RateLimit(SendLimit(router, is_valid), settings.http_requests_per_s, settings.http_connections // 2)
    return AuthenticationMiddleware(_RefusalAudit(rate_limited, audit), backend=BearerAuthBackend(verifier))


class _ScopeRouter:
    """Passes a request on to the application that its token, or its user, may use."""

    def __init__(self, full_app: ASGIApp, read_only_app: ASGIApp, token_required: bool) -> None:
        self._full_app, self._read_only_app, self._token_required = full_app, read_only_app, token_required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user, peer = scope.get("user"), scope["state"]["peer"]
        assert isinstance(peer, Peer)
        if isinstance(user, AuthenticatedUser):
            app = self._full_app if "run" in user.scopes else self._read_only_app
        elif self._token_required or header(scope, b"authorization") is not None or not peer.is_same_user:
            app = _send_unauthorized
        else:
            app = self._full_app
        await app(scope, receive, send)


async def _send_unauthorized(scope: Scope, receive: Receive, send: Send) -> None:
    """The same text for every invalid token, so that it says nothing about existing tokens."""
    if header(scope, b"authorization") is None:
        message, challenge = f"a bearer token is needed; {_ADVICE}", 'Bearer realm="rhapsody-mcp"'
    else:
        message = f"the token is not known here, was revoked or has expired; {_ADVICE}"
        challenge = f'Bearer realm="rhapsody-mcp", error="invalid_token", error_description="{message}"'
    await send_error(send, 401, message, www_authenticate=challenge)


class _ScopeChallenge:
    """Answers calls of withheld tools with the challenge that MCP's authorization specifies; `app` lacks the tools.

    Gets the body whole, from BodyLimit.
    """

    def __init__(self, app: ASGIApp, withheld_tools: Collection[str]) -> None:
        self._app, self._withheld_tools = app, withheld_tools

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        request = _json_object(body)
        params = request.get("params")
        name = params.get("name") if isinstance(params, dict) else None
        if request.get("method") == "tools/call" and isinstance(name, str) and name in self._withheld_tools:
            challenge = 'Bearer error="insufficient_scope", scope="run", error_description="this token may only read"'
            message = f"{name} needs a token with the scope run; this one may only read."
            await send_error(send, 403, message, id=request.get("id"), www_authenticate=challenge)
            return
        await self._app(scope, replay_body(body, receive), send)


def _json_object(body: bytes) -> dict[str, object]:
    """Empty where the body is no JSON object."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class _RefusalAudit:
    """Records refused requests in the audit log. Of one caller's flood, one in 10 s, with the number left out."""

    def __init__(self, app: ASGIApp, audit: Audit) -> None:
        self._app, self._audit = app, audit
        self._buckets = TokenBuckets(per_s=0.1, capacity=20)
        self._unrecorded: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def audited_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in _AUDITED_STATUSES:
                self._record(scope, message["status"])
            await send(message)

        await self._app(scope, receive, audited_send)

    def _record(self, scope: Scope, status: int) -> None:
        caller = caller_name(scope)
        if self._buckets.take(caller):
            self._unrecorded[caller] += 1
            return
        request = f"{scope['method']} {scope['path']}"
        more = {"unsaid_before": count} if (count := self._unrecorded.pop(caller, 0)) else {}
        self._audit.refused(caller, str(scope["state"]["peer"]), request, status, **more)
