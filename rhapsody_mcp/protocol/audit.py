"""Writes down who called what, when, and what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import anyio
from mcp import MCPError
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

from rhapsody_mcp.protocol.audit_log import AuditFile
from rhapsody_mcp.runtime.call_context import current_caller, current_peer
from rhapsody_mcp.runtime.redaction import redacted, summary
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.replies.formatting import one_line, shortened

__all__ = ["Audit", "follow", "open_audit"]

T = TypeVar("T")
_QUIET = {"ping"}
_CLIENT_INFO = "io.modelcontextprotocol/clientInfo"
_TOLD = ("session", "submitted", "first", "last", "repeated", "task", "canceled")
"""What of a reply says which tasks it is about."""
_NAME_CHARS, _WHY_CHARS = 60, 300
_HANDLE_CHARS = 8
"""Of a handle: who knows the whole of it, and calls without a token too, is told the result."""


class Audit:
    """A middleware of MCP servers: `current_caller` says who calls as long as a call lasts, and each request becomes
    an entry when it has been answered. A call that was answered with a handle has one more when it ends.

    Several servers may share one. Without a file it writes nothing.
    """

    def __init__(self, file: AuditFile | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._file, self._now = file, now

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.request_id is None or ctx.method in _QUIET:
            return await call_next(ctx)
        call = _Call(self, _who(ctx), ctx)
        with _during(call), self._recorded(call):
            result = await call_next(ctx)
            call.came = _came_of(result)
            return result

    def refused(self, caller: str, peer: str, asked: str, status: int, **more: Any) -> None:
        """A request over HTTP that never was a call."""
        who = {"caller": caller, "peer": peer, "transport": "http"}
        self._append({**who, "method": asked, "result": "refused", "why": f"HTTP status {status}", **more})

    def token(self, done: str, name: str) -> None:
        """A token was made or revoked by this process's user."""
        who = {"peer": f"uid {os.geteuid()}, pid {os.getpid()}", "transport": "command"}
        self._append({**who, "method": f"token {done}", "token": name, "result": "ok"})

    @contextmanager
    def _recorded(self, call: _Call) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            call.came = _failed_with(error)
            raise
        finally:
            call.answered = True
            self.write(call)

    def write(self, call: _Call, **more: Any) -> None:
        """An entry of this call: what came of it, or `more` in the place of that."""
        if self._file is not None:
            self._append({**call.entry(), **(more or call.came)})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write({"at": self._now().isoformat(timespec="milliseconds"), **entry})


@contextmanager
def open_audit(file: Path, settings: Settings) -> Iterator[Audit]:
    """An audit that writes into this file until the end of the block."""
    opened = AuditFile(file, settings.audit_bytes, settings.audit_files)
    try:
        yield Audit(opened)
    finally:
        opened.close()


async def follow(running: Awaitable[T]) -> T:
    """What a tool gives; where its client has been answered before, with a handle, its end is an entry too."""
    call = _current.get(None)
    if call is None:
        return await running
    try:
        result = await running
    except BaseException as error:
        call.end_late(error)
        raise
    call.end_late(result)
    return result


@dataclass
class _Call:
    audit: Audit
    who: Mapping[str, Any]
    ctx: ServerRequestContext[Any, Any]
    came: Mapping[str, Any] = field(default_factory=dict)
    answered: bool = False
    began: float = field(default_factory=time.monotonic)

    def entry(self) -> dict[str, Any]:
        return {**self.who, **_asked(self.ctx), "ms": round((time.monotonic() - self.began) * 1000)}

    def end_late(self, end: object) -> None:
        """`end` is a result or an exception."""
        if not self.answered:
            return
        came = _failed_with(end) if isinstance(end, BaseException) else _came_of(cast(HandlerResult, end))
        handle = {"handle": self.came["handle"]} if "handle" in self.came else {}
        self.audit.write(self, **came, **handle, deferred=True)


_current: ContextVar[_Call] = ContextVar("_current")


@contextmanager
def _during(call: _Call) -> Iterator[None]:
    """A task that the call starts goes on with what is set here; one that serves many calls does not."""
    before = current_caller.set(_named(call.who)), _current.set(call)
    try:
        yield
    finally:
        current_caller.reset(before[0])
        _current.reset(before[1])


def _who(ctx: ServerRequestContext[Any, Any]) -> dict[str, Any]:
    token = get_access_token()
    peer = current_peer.get()
    if ctx.request is not None:
        peer, transport = str(ctx.request.scope.get("state", {}).get("peer", "")), "http"
    else:
        transport = "socket" if peer else "stdio"
    who = {"client": _client(ctx), "token": token and token.client_id, "peer": peer, "transport": transport}
    return {key: value for key, value in who.items() if value}


def _client(ctx: ServerRequestContext[Any, Any]) -> str:
    """The name and version that the client gives itself; nobody has checked them."""
    params = ctx.params or {}
    known = ctx.session.client_params
    if known is not None:
        told = [known.client_info.name, known.client_info.version]
    else:
        info = params.get("clientInfo") or (params.get("_meta") or {}).get(_CLIENT_INFO) or {}
        told = [str(info.get(key, "")) for key in ("name", "version")] if isinstance(info, Mapping) else []
    return " ".join(one_line(text[:_NAME_CHARS]) for text in told if text)


def _named(who: Mapping[str, Any]) -> str:
    """As in `token laptop: claude-code 2.1 over http`."""
    token = f"token {who['token']}: " if "token" in who else ""
    return f"{token}{who.get('client', 'a client')} over {who['transport']}"


def _asked(ctx: ServerRequestContext[Any, Any]) -> dict[str, Any]:
    params = {key: value for key, value in (ctx.params or {}).items() if key != "_meta"}
    if ctx.method.startswith("tasks/"):
        return {"method": ctx.method, "handle": str(params.get("taskId"))[:_HANDLE_CHARS]}
    if ctx.method != "tools/call":
        return {"method": ctx.method, **({"params": summary(params)} if params else {})}
    arguments = params.get("arguments")
    told = arguments if isinstance(arguments, Mapping) else {}
    asked = {"method": ctx.method, "tool": _short(params.get("name")), "arguments": summary(told)}
    return {**asked, "session": _short(told["session"])} if "session" in told else asked


def _came_of(result: HandlerResult) -> dict[str, Any]:
    wire = result.model_dump(mode="json", by_alias=True) if isinstance(result, BaseModel) else dict(result or {})
    kind = wire.get("resultType")
    if kind == "task":
        return {"result": "deferred", "handle": str(wire.get("taskId"))[:_HANDLE_CHARS]}
    if kind == "input_required":
        return {"result": "asked"}
    if wire.get("isError"):
        return {"result": "refused", "why": _why(_first_text(wire))}
    data = wire.get("structuredContent") or {}
    return {"result": "ok", **{key: _short(data[key]) for key in _TOLD if key in data}}


def _failed_with(error: BaseException) -> dict[str, Any]:
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return {"result": "canceled"}
    if isinstance(error, ToolError):
        return {"result": "refused", "why": _why(str(error))}
    if isinstance(error, MCPError):
        return {"result": "error", "code": error.error.code, "why": _why(error.error.message)}
    return {"result": "error", "why": _why(f"{type(error).__name__}: {error}")}


def _first_text(wire: Mapping[str, Any]) -> str:
    texts = (block.get("text", "") for block in wire.get("content") or () if isinstance(block, Mapping))
    return next(texts, "")


def _why(text: str) -> str:
    return redacted(shortened(text.partition("\n")[0], _WHY_CHARS))


def _short(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float) else redacted(str(value))[:200]
