"""The page over HTTP, below any path that ends in /dashboard/."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rhapsody_mcp.dashboard.feed import Cursor, Feed
from rhapsody_mcp.dashboard.page_text import page_html
from rhapsody_mcp.model.errors import RhapsodyError, UnknownName
from rhapsody_mcp.protocol.audit import Audit
from rhapsody_mcp.protocol.dashboard import FILES, Dashboard
from rhapsody_mcp.serving.http.limits import caller_name, send_error

__all__ = ["PageData", "PageFile"]

_FOLDER = "/dashboard"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Accel-Buffering": "no",  # nginx would hold events back
    "Content-Security-Policy": "frame-ancestors 'self'",
}


def _name(scope: Scope) -> str | None:
    """What is asked of the page, as in `events` of /proxy/8765/dashboard/events; None for another path. A proxy may
    leave its own prefix in the path."""
    before, folder, name = str(scope.get("path", "")).rpartition(f"{_FOLDER}/")
    return name if folder and scope["type"] == "http" and "/" not in name and not before.endswith("/mcp") else None


class PageFile:
    """Gives out the page itself, which holds no data, to everyone who calls this host by a name that is allowed."""

    def __init__(self, app: ASGIApp, checks: TransportSecuritySettings) -> None:
        self._app, self._checks = app, TransportSecurityMiddleware(checks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_folder = scope["type"] == "http" and str(scope["path"]).endswith(_FOLDER)
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not (is_folder or _name(scope) == ""):
            await self._app(scope, receive, send)
            return
        response: Response | None = await self._checks.validate_request(Request(scope))
        if response is None and is_folder:
            query = scope["query_string"].decode("latin-1")
            response = RedirectResponse(f".{_FOLDER}/{'?' * bool(query)}{query}")  # relative: a proxy's prefix stays
        elif response is None:
            response = Response(page_html("http"), media_type="text/html", headers=_HEADERS)
        await response(scope, receive, send)


class PageData:
    """Answers the page, for a caller who was let in. Without `may_cancel` nothing can be changed."""

    def __init__(
        self, app: ASGIApp, dashboard: Dashboard, checks: TransportSecuritySettings, audit: Audit, *, may_cancel: bool
    ) -> None:
        self._app, self._dashboard, self._audit = app, dashboard, audit
        self._checks, self._may_cancel = TransportSecurityMiddleware(checks), may_cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (name := _name(scope)):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        if (refusal := await self._checks.validate_request(request)) is not None:
            await refusal(scope, receive, send)
            return
        try:
            response = await self._answer(name, request)
        except RhapsodyError as error:
            await send_error(send, 404 if isinstance(error, UnknownName) else 400, str(error))
            return
        if response is None:
            await send_error(send, 405, f"{request.method} {name} is not there: the page reads with GET.")
            return
        response.headers.update(_HEADERS)
        await response(scope, receive, send)

    async def _answer(self, name: str, request: Request) -> Response | None:
        query = dict(request.query_params)
        session = query.get("session", "")
        if request.method == "POST" and name == "cancel":
            return await self._cancel(session, query.get("tasks", ""), request)
        if request.method != "GET":
            return None
        if name == "events":
            return StreamingResponse(_events(self._dashboard.feed(session)), media_type="text/event-stream")
        if name in FILES:
            return Response(await self._dashboard.file(name, session), media_type=FILES[name])
        answer = await self._dashboard.answer(name, query)
        return _json({**answer, "may_cancel": self._may_cancel} if name == "sessions" else answer)

    async def _cancel(self, session: str, tasks: str, request: Request) -> Response:
        if not self._may_cancel:
            message = "canceling needs a token with the scope run; this one may only read."
            return _json({"error": message}, status=403)
        uids = [uid for uid in tasks.split(",") if uid]
        canceled = await self._dashboard.cancel(session, uids)
        peer = str(request.scope["state"]["peer"])
        self._audit.canceled(caller_name(request.scope), peer, session, [task.uid for task in canceled])
        return _json({"canceled": len(canceled)})


async def _events(feed: Feed) -> AsyncIterator[bytes]:
    async for parts in feed.frames(Cursor()):
        yield b"data: "
        for part in parts:
            yield part
        yield b"\n\n"


def _json(data: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status_code=status, media_type="application/json")
