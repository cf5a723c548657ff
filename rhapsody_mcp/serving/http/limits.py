"""Limits what one HTTP caller can take from the others: requests, their size and their time."""

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

from rhapsody_mcp.serving.invalid_messages import SHORTEN_ADVICE
from rhapsody_mcp.serving.peer_credentials import Peer

__all__ = ["BodyLimit", "RateLimit", "SendLimit", "TokenBuckets", "caller_name", "header", "replay_body", "send_error"]

_BURST_S = 4
"""A caller that was silent may send the requests of this many seconds at once."""
_MAX_NAMES = 10_000
_MAX_BODIES = 16
"""Memory for request bodies, in bodies of the largest size."""
_SEND_TIMEOUT_S = 60.0
"""A client that reads nothing of a reply for this time has gone."""
_INVALID_REQUEST = -32600


async def send_error(send: Send, status: int, message: str, id: Any = None, **headers: str) -> None:
    """Answer with a JSON-RPC error, which clients show. Leaves the connection open: a client that is still sending
    would not read the answer of a closed one."""
    error = {"jsonrpc": "2.0", "id": id, "error": {"code": _INVALID_REQUEST, "message": message}}
    body = json.dumps(error).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def caller_name(scope: Scope) -> str:
    """The token's name, or without a token the peer's address or user."""
    user = scope.get("user")
    peer: Peer = scope["state"]["peer"]
    return f"token {user.display_name}" if user is not None and user.is_authenticated else peer.host


class TokenBuckets:
    """The token-bucket algorithm, with one bucket for each name: `capacity` tokens, refilled by `per_s` a second."""

    def __init__(self, per_s: float, capacity: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._capacity, self._now = per_s, capacity, now
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By name, least recently used first: the level and its time."""

    def take(self, name: str) -> float:
        """Take one token: 0 on success, else the seconds until there is one. Least recently used names are dropped;
        only a flood of names drops a bucket that is not full."""
        now = self._now()
        level, updated = self._levels.pop(name, (self._capacity, now))
        level = min(self._capacity, level + (now - updated) * self._per_s)
        self._levels[name] = (level - 1 if level >= 1 else level), now
        if len(self._levels) > _MAX_NAMES:
            self._levels.popitem(last=False)
        return 0.0 if level >= 1 else (1 - level) / self._per_s


class RateLimit:
    """Limits one caller's requests a second and its open requests; answers those beyond with 429."""

    def __init__(self, app: ASGIApp, per_s: float, max_open: int) -> None:
        self._app, self._per_s, self._max_open = app, per_s, max_open
        self._buckets = TokenBuckets(per_s, max(1.0, per_s * _BURST_S))
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_name(scope)
        if self._open[caller] >= self._max_open:
            message = f"{self._max_open} requests of yours are open (half of the setting http_connections): end one."
            await send_error(send, 429, message, retry_after="1")
            return
        if wait_s := self._buckets.take(caller):
            message = f"more than {self._per_s:g} requests a second (setting http_requests_per_s): wait, then go on."
            await send_error(send, 429, message, retry_after=str(math.ceil(wait_s)))
            return
        self._open[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


class BodyLimit:
    """Reads the whole body before the application gets the request. Answers 413 for a long body, 408 for a slow one,
    and 503 while the bodies of other requests take the memory."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s
        self._held_bytes = 0
        """Of all requests together."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[bytes] = []
        try:
            refusal: tuple[int, str] | None = None
            with anyio.move_on_after(self._timeout_s) as reading:
                refusal = await self._read(scope, receive, parts)
            if reading.cancelled_caught:
                refusal = 408, f"the request did not come whole within {self._timeout_s:g} s (setting http_slow_s)."
            if refusal is not None:
                await send_error(send, *refusal)
                return
            parts[:] = [b"".join(parts)]
            await self._app(scope, replay_body(parts[0], receive), send)
        finally:
            self._held_bytes -= sum(map(len, parts))

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> tuple[int, str] | None:
        """Append the body's parts. Returns the status and the message of a refusal, or None."""
        length, more = int(header(scope, b"content-length") or 0), True
        while more and length <= self._max_bytes:
            message = await receive()
            if message["type"] != "http.request":
                return 400, "the client has gone."
            parts.append(message.get("body", b""))
            self._held_bytes += len(parts[-1])
            if self._held_bytes > _MAX_BODIES * self._max_bytes:
                return 503, "other requests take the memory that there is for them: try again."
            length = max(length, sum(map(len, parts)))
            more = message.get("more_body", False)
        return None if length <= self._max_bytes else (413, self._too_long())

    def _too_long(self) -> str:
        return f"the request is longer than {self._max_bytes} bytes (setting request_bytes). {SHORTEN_ADVICE}"


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this whole body first, and then what `receive` gives."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return unread.pop() if unread else await receive()

    return next_message


class SendLimit:
    """Cuts the connection of a client that does not read its reply, and a stream whose token is no longer valid.

    The SDK writes to each stream at least every 15 s: a comment that keeps the stream open.
    """

    def __init__(self, app: ASGIApp, is_valid: Callable[[Scope], bool]) -> None:
        self._app, self._is_valid = app, is_valid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as serving:

            async def limited_send(message: Message) -> None:
                with anyio.move_on_after(_SEND_TIMEOUT_S):
                    if self._is_valid(scope):
                        await send(message)
                        return
                scope["state"]["cut"]()
                serving.cancel()
                await anyio.lowlevel.checkpoint()

            await self._app(scope, receive, limited_send)
        if serving.cancelled_caught:
            await anyio.lowlevel.checkpoint()  # lets the server see that the connection is cut
