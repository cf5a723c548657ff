"""Bounds what one caller over HTTP can take from the others: requests, their size, and the time that they take."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rhapsody_mcp.serving.invalid_messages import SHORTER
from rhapsody_mcp.serving.peer_credentials import Peer

__all__ = ["BodyLimit", "Buckets", "RateLimit", "SendLimit", "caller_of", "header", "refuse"]

_BURST_S = 4
"""Who was silent may send the requests of so many seconds at once."""
_NAMES_KNOWN = 10_000
_BODIES = 16
"""So many requests of the largest size are held at once."""
_STUCK_S = 60.0
"""A client that takes nothing of a reply for so long has gone."""
_INVALID_REQUEST = -32600


async def refuse(send: Send, status: int, message: str, id: Any = None, **headers: str) -> None:
    """Answer with a JSON-RPC error, which clients show. The connection is not closed: who still sends would not read
    the answer. It is cut where that takes long."""
    error = {"jsonrpc": "2.0", "id": id, "error": {"code": _INVALID_REQUEST, "message": message}}
    body = json.dumps(error).encode()
    told = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def caller_of(scope: Scope) -> str:
    """The name of the token, or else the address or the user at the other end."""
    user = scope.get("user")
    peer: Peer = scope["state"]["peer"]
    return f"token {user.display_name}" if user is not None and user.is_authenticated else peer.host


class Buckets:
    """For each name a bucket that holds `most`, and that fills again at so many a second."""

    def __init__(self, per_s: float, most: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._most, self._now = per_s, most, now
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> float:
        """Take one: 0 where there was one, else how many seconds until there is. Names that were not heard of for the
        longest are forgotten: they are full again but for a flood of names."""
        now = self._now()
        level, then = self._levels.pop(name, (self._most, now))
        level = min(self._most, level + (now - then) * self._per_s)
        self._levels[name] = (level - 1 if level >= 1 else level), now
        if len(self._levels) > _NAMES_KNOWN:
            self._levels.popitem(last=False)
        return 0.0 if level >= 1 else (1 - level) / self._per_s


class RateLimit:
    """So many requests a second of one caller, and so many at a time; those beyond are answered with 429."""

    def __init__(self, app: ASGIApp, per_s: float, at_once: int) -> None:
        self._app, self._per_s, self._at_once = app, per_s, at_once
        self._buckets = Buckets(per_s, max(1.0, per_s * _BURST_S))
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        if self._open[caller] >= self._at_once:
            words = f"{self._at_once} requests of yours are open (half of the setting http_connections): end one."
            await refuse(send, 429, words, retry_after="1")
            return
        if wait_s := self._buckets.take(caller):
            words = f"more than {self._per_s:g} requests a second (setting http_requests_per_s): wait, then go on."
            await refuse(send, 429, words, retry_after=str(math.ceil(wait_s)))
            return
        self._open[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


class BodyLimit:
    """Takes a body whole before the request goes on. One that is too long is answered with 413, one that does not
    come with 408, and with 503 one that there is no memory for while others are served."""

    def __init__(self, app: ASGIApp, max_bytes: int, within_s: float) -> None:
        self._app, self._max_bytes, self._within_s = app, max_bytes, within_s
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[bytes] = []
        try:
            refused: tuple[int, str] | None = None
            with anyio.move_on_after(self._within_s) as reading:
                refused = await self._read(scope, receive, parts)
            if reading.cancelled_caught:
                refused = 408, f"the request did not come whole within {self._within_s:g} s (setting http_slow_s)."
            if refused is not None:
                await refuse(send, *refused)
                return
            parts[:] = [b"".join(parts)]
            await self._app(scope, _replay(parts[0], receive), send)
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> tuple[int, str] | None:
        """Why it is refused: the status and the words."""
        length, more = int(header(scope, b"content-length") or 0), True
        while more and length <= self._max_bytes:
            message = await receive()
            if message["type"] != "http.request":
                return 400, "the client has gone."
            parts.append(message.get("body", b""))
            self._held += len(parts[-1])
            if self._held > _BODIES * self._max_bytes:
                return 503, "other requests take the memory that there is for them: try again."
            length = max(length, sum(map(len, parts)))
            more = message.get("more_body", False)
        return None if length <= self._max_bytes else (413, self._too_long())

    def _too_long(self) -> str:
        return f"the request is longer than {self._max_bytes} bytes (setting request_bytes). {SHORTER}"


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


class SendLimit:
    """Cuts the connection of a client that does not take its reply, and of a stream whose token is no longer `valid`.

    Streams are written to at least every 15 s, when the SDK sends a comment that keeps them open.
    """

    def __init__(self, app: ASGIApp, valid: Callable[[Scope], bool]) -> None:
        self._app, self._valid = app, valid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as serving:

            async def bounded(message: Message) -> None:
                with anyio.move_on_after(_STUCK_S):
                    if self._valid(scope):
                        await send(message)
                        return
                scope["state"]["cut"]()
                serving.cancel()
                await anyio.lowlevel.checkpoint()

            await self._app(scope, receive, bounded)
        if serving.cancelled_caught:
            await anyio.lowlevel.checkpoint()  # the server sees that the connection is cut
