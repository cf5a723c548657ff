"""The audit: an entry in a log for each request, with the caller and the end of the call."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
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

from rhapsody_mcp.protocol.apps import REFRESH_TOOL
from rhapsody_mcp.protocol.audit_log import AuditFile
from rhapsody_mcp.runtime.call_context import current_caller, current_client, current_peer
from rhapsody_mcp.runtime.redaction import redacted, summary
from rhapsody_mcp.runtime.telemetry.current import current_ids
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.replies.formatting import one_line, shortened

__all__ = ["Audit", "audit_deferred", "open_audit"]

T = TypeVar("T")
_UNRECORDED_METHODS = {"ping"}
_CLIENT_INFO = "io.modelcontextprotocol/clientInfo"
_RECORDED_FIELDS = ("session", "submitted", "first", "last", "repeated", "task", "canceled")
"""The fields of a reply that name tasks."""
_NAME_CHARS, _REASON_CHARS = 60, 300
_TASKS_RECORDED = 20
_HANDLE_CHARS = 8
"""Only the beginning of a handle is recorded: without tokens, the whole handle gives access to the result."""


class Audit:
    """Middleware of MCP servers. Sets `current_caller` and `current_client` during each call, and writes an entry when
    a request is answered; a call that was answered with a handle gets a second entry when it ends.

    Several servers may share one audit. Without a file it writes nothing.
    """

    def __init__(self, file: AuditFile | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._file, self._now = file, now

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.request_id is None or ctx.method in _UNRECORDED_METHODS or _is_refresh(ctx):
            return await call_next(ctx)
        client = _client(ctx)
        call = _Call(self, client[0], _caller_fields(ctx, client), ctx)
        with _as_current(call), self._recorded(call):
            result = await call_next(ctx)
            call.end = _result_fields(result)
            return result

    def refused(self, caller: str, peer: str, request: str, status: int, **fields: Any) -> None:
        """Record an HTTP request that was refused before it became a call."""
        origin = {"caller": caller, "peer": peer, "transport": "http"}
        self._append({**origin, "method": request, "result": "refused", "why": f"HTTP status {status}", **fields})

    def canceled(self, caller: str, peer: str, session: str, tasks: Sequence[str]) -> None:
        """Record that a person canceled tasks on the page."""
        origin = {"caller": caller, "peer": peer, "transport": "http"}
        fields = {"session": session, "canceled": len(tasks), "tasks": list(tasks[:_TASKS_RECORDED]), "result": "ok"}
        self._append({**origin, "method": "dashboard cancel", **fields})

    def token(self, action: str, name: str) -> None:
        """Record that this process's user made or revoked a token."""
        origin = {"peer": f"uid {os.geteuid()}, pid {os.getpid()}", "transport": "command"}
        self._append({**origin, "method": f"token {action}", "token": name, "result": "ok"})

    @contextmanager
    def _recorded(self, call: _Call) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            call.end = _error_fields(error)
            raise
        finally:
            call.answered = True
            self.write(call)

    def write(self, call: _Call, **end: Any) -> None:
        """Write an entry of the call with these fields of its end; default are the call's own."""
        if self._file is not None:
            self._append({**call.entry(), **(end or call.end)})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write({"at": self._now().isoformat(timespec="milliseconds"), **entry})


def _is_refresh(ctx: ServerRequestContext[Any, Any]) -> bool:
    return ctx.method == "tools/call" and (ctx.params or {}).get("name") == REFRESH_TOOL


@contextmanager
def open_audit(file: Path, settings: Settings) -> Iterator[Audit]:
    """An audit that writes to this file until the end of the block."""
    audit_file = AuditFile(file, settings.audit_bytes, settings.audit_files)
    try:
        yield Audit(audit_file)
    finally:
        audit_file.close()


async def audit_deferred(running: Awaitable[T]) -> T:
    """Await a tool's result. Writes the second entry of a call that has been answered with a handle."""
    call = _current.get(None)
    if call is None:
        return await running
    try:
        result = await running
    except BaseException as error:
        call.end_deferred(error)
        raise
    call.end_deferred(result)
    return result


@dataclass
class _Call:
    audit: Audit
    client: str
    caller: Mapping[str, Any]
    ctx: ServerRequestContext[Any, Any]
    end: Mapping[str, Any] = field(default_factory=dict)
    """The entry's fields of the reply or of the error."""
    answered: bool = False
    began: float = field(default_factory=time.monotonic)

    def entry(self) -> dict[str, Any]:
        took = {"ms": round((time.monotonic() - self.began) * 1000)}
        return {**self.caller, **_request_fields(self.ctx), **took, **current_ids()}

    def end_deferred(self, end: object) -> None:
        """Write the second entry, if the call has been answered. `end` is the result or the exception."""
        if not self.answered:
            return
        fields = _error_fields(end) if isinstance(end, BaseException) else _result_fields(cast(HandlerResult, end))
        handle = {"handle": self.end["handle"]} if "handle" in self.end else {}
        self.audit.write(self, **fields, **handle, deferred=True)


_current: ContextVar[_Call] = ContextVar("_current")


@contextmanager
def _as_current(call: _Call) -> Iterator[None]:
    """Tasks that the call starts inherit these context variables; tasks that serve many calls do not."""
    tokens = (
        current_caller.set(_caller_text(call.caller)),
        current_client.set(call.client),
        _current.set(call),
    )
    try:
        yield
    finally:
        current_caller.reset(tokens[0])
        current_client.reset(tokens[1])
        _current.reset(tokens[2])


def _caller_fields(ctx: ServerRequestContext[Any, Any], client: tuple[str, str]) -> dict[str, Any]:
    token = get_access_token()
    peer = current_peer.get()
    if ctx.request is not None:
        peer, transport = str(ctx.request.scope.get("state", {}).get("peer", "")), "http"
    else:
        transport = "socket" if peer else "stdio"
    fields = {
        "client": " ".join(text for text in client if text),
        "token": token and token.client_id,
        "peer": peer,
        "transport": transport,
    }
    return {key: value for key, value in fields.items() if value}


def _client(ctx: ServerRequestContext[Any, Any]) -> tuple[str, str]:
    """The name and the version that the client states, unverified; "" for each that it does not state."""
    params = ctx.params or {}
    initialized = ctx.session.client_params
    if initialized is not None:
        name, version = initialized.client_info.name, initialized.client_info.version
    else:
        info = params.get("clientInfo") or (params.get("_meta") or {}).get(_CLIENT_INFO) or {}
        stated = info if isinstance(info, Mapping) else {}
        name, version = str(stated.get("name", "")), str(stated.get("version", ""))
    return one_line(name[:_NAME_CHARS]), one_line(version[:_NAME_CHARS])


def _caller_text(caller: Mapping[str, Any]) -> str:
    """As in `token laptop: claude-code 2.1 over http`."""
    token = f"token {caller['token']}: " if "token" in caller else ""
    return f"{token}{caller.get('client', 'a client')} over {caller['transport']}"


def _request_fields(ctx: ServerRequestContext[Any, Any]) -> dict[str, Any]:
    params = {key: value for key, value in (ctx.params or {}).items() if key != "_meta"}
    if ctx.method.startswith("tasks/"):
        return {"method": ctx.method, "handle": str(params.get("taskId"))[:_HANDLE_CHARS]}
    if ctx.method != "tools/call":
        return {"method": ctx.method, **({"params": summary(params)} if params else {})}
    arguments = params.get("arguments")
    if not isinstance(arguments, Mapping):
        arguments = {}
    fields = {"method": ctx.method, "tool": _value(params.get("name")), "arguments": summary(arguments)}
    return {**fields, "session": _value(arguments["session"])} if "session" in arguments else fields


def _result_fields(result: HandlerResult) -> dict[str, Any]:
    reply = result.model_dump(mode="json", by_alias=True) if isinstance(result, BaseModel) else dict(result or {})
    kind = reply.get("resultType")
    if kind == "task":
        return {"result": "deferred", "handle": str(reply.get("taskId"))[:_HANDLE_CHARS]}
    if kind == "input_required":
        return {"result": "asked"}
    if reply.get("isError"):
        return {"result": "refused", "why": _reason(_first_text(reply))}
    data = reply.get("structuredContent") or {}
    return {"result": "ok", **{key: _value(data[key]) for key in _RECORDED_FIELDS if key in data}}


def _error_fields(error: BaseException) -> dict[str, Any]:
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return {"result": "canceled"}
    if isinstance(error, ToolError):
        return {"result": "refused", "why": _reason(str(error))}
    if isinstance(error, MCPError):
        return {"result": "error", "code": error.error.code, "why": _reason(error.error.message)}
    return {"result": "error", "why": _reason(f"{type(error).__name__}: {error}")}


def _first_text(reply: Mapping[str, Any]) -> str:
    texts = (block.get("text", "") for block in reply.get("content") or () if isinstance(block, Mapping))
    return next(texts, "")


def _reason(text: str) -> str:
    return redacted(shortened(text.partition("\n")[0], _REASON_CHARS))


def _value(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float) else redacted(str(value))[:200]
