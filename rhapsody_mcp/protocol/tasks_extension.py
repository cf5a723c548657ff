"""The Tasks extension of MCP: a client that declares it gets a handle for a call that waits, and polls for the result.

A task in the sense of the extension is a call of a tool, not a task of a session.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, cast

import anyio
import anyio.abc
from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Extension, MethodBinding, authenticated_principal, require_client_extension
from mcp.types import HEADER_MISMATCH, INTERNAL_ERROR, INVALID_PARAMS, CallToolRequestParams, RequestParams
from pydantic import BaseModel

from rhapsody_mcp.protocol.task_store import Handle, HandlesInMemory, HandleStore
from rhapsody_mcp.toolsets.tooling.deferred import LONGEST_WAIT_S, current_call

__all__ = ["TASKS", "TasksExtension"]

TASKS = "io.modelcontextprotocol/tasks"
_VERSIONS = frozenset({"2026-07-28"})
_KEPT_S = 3600.0
"""How long a result is kept for its owner."""
_HANDLES_PER_OWNER = 200

_log = logging.getLogger(__name__)
_Context = ServerRequestContext[Any, Any]


class _TaskParams(RequestParams):
    task_id: str


class _UpdateParams(_TaskParams):
    input_responses: dict[str, Any]


class TasksExtension(Extension):
    """Lives as long as the process, not as a connection. Leaving `async with` ends the waits, and nothing else.

    A call is answered with a handle where its tool lets the client go (`deferring.defer`); every other call, and
    every call of a client that does not declare the extension, is answered with its result.
    """

    identifier = TASKS

    def __init__(
        self, store: HandleStore | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._store: HandleStore = store or HandlesInMemory()
        self._now = now
        self._running: dict[str, _Call] = {}
        self._group: anyio.abc.TaskGroup

    async def __aenter__(self) -> Self:
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._group.cancel_scope.cancel()
        return await self._group.__aexit__(kind, error, trace)

    # --- what the protocol calls

    def methods(self) -> Sequence[MethodBinding]:
        return [
            MethodBinding("tasks/get", _TaskParams, self._get, _VERSIONS),
            MethodBinding("tasks/update", _UpdateParams, self._update, _VERSIONS),
            MethodBinding("tasks/cancel", _TaskParams, self._cancel, _VERSIONS),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: _Context, call_next: CallNext
    ) -> HandlerResult:
        if not _can_come_back(ctx):
            return await call_next(ctx)
        call = _Call(self, authenticated_principal(ctx))
        self._group.start_soon(call.run, call_next, ctx)
        return await call.answer()

    async def _get(self, ctx: _Context, params: _TaskParams) -> HandlerResult:
        return {"resultType": "complete", **self._find(ctx, params.task_id).wire()}

    async def _update(self, ctx: _Context, params: _UpdateParams) -> HandlerResult:
        handle = self._find(ctx, params.task_id)
        if (call := self._running.get(handle.task_id)) is not None:
            call.take(params.input_responses)
        return {"resultType": "complete"}

    async def _cancel(self, ctx: _Context, params: _TaskParams) -> HandlerResult:
        handle = self._find(ctx, params.task_id)
        if (call := self._running.get(handle.task_id)) is not None:
            call.cancel()
        return {"resultType": "complete"}

    def _find(self, ctx: _Context, task_id: str) -> Handle:
        """Raises MCPError where there is none, and in the same words where it is another's."""
        require_client_extension(ctx, TASKS)
        headers = getattr(ctx.request, "headers", None)
        if headers is not None and headers.get("mcp-name") != task_id:
            raise MCPError(code=HEADER_MISMATCH, message="Mcp-Name header does not match params.taskId")
        self._store.drop_expired(self._now())
        handle = self._store.get(task_id)
        if handle is None or handle.owner != authenticated_principal(ctx):
            raise MCPError(code=INVALID_PARAMS, message="Failed to retrieve task: Task not found")
        return handle

    # --- what the calls in progress call

    def issue(self, call: _Call) -> Handle | None:
        """A new handle for it, which can be got from now on; None where its owner has too many."""
        now = self._now()
        self._store.drop_expired(now)
        if self._store.count(call.owner) >= _HANDLES_PER_OWNER:
            return None
        handle = Handle(
            task_id=secrets.token_urlsafe(24),
            owner=call.owner,
            created_at=now,
            last_updated_at=now,
            ttl_ms=round((LONGEST_WAIT_S + _KEPT_S) * 1000),
        )
        self._store.put(handle)
        self._running[handle.task_id] = call
        return handle

    def change(self, handle: Handle, **fields: Any) -> Handle:
        changed = handle.model_copy(update={**fields, "last_updated_at": self._now()})
        self._store.put(changed)
        return changed

    def end(self, handle: Handle, **fields: Any) -> None:
        """From now on it is kept for its owner, and then expires."""
        del self._running[handle.task_id]
        lived = self._now() - handle.created_at + timedelta(seconds=_KEPT_S)
        self.change(handle, **fields, input_requests=None, ttl_ms=round(lived.total_seconds() * 1000))


class _Call:
    """A call in progress. Its client is answered when it ends, or before, with a handle."""

    def __init__(self, extension: TasksExtension, owner: str | None) -> None:
        self.owner = owner
        self._extension = extension
        self._scope = anyio.CancelScope()
        self._answered = anyio.Event()
        self._first: Handle | None = None
        self._handle: Handle | None = None
        self._result: HandlerResult = None
        self._error: Exception | None = None
        self._answers: dict[str, Any] = {}
        self._told = anyio.Event()

    async def answer(self) -> HandlerResult:
        """The result, or a handle. Whoever cancels this cancels the call."""
        try:
            await self._answered.wait()
        except anyio.get_cancelled_exc_class():
            self.cancel()
            raise
        if self._first is not None:
            return {"resultType": "task", **self._first.wire()}
        if self._error is not None:
            raise self._error
        return self._result

    async def run(self, call_next: CallNext, ctx: _Context) -> None:
        current_call.set(self)
        self._error = MCPError(code=INTERNAL_ERROR, message="The server is stopping")
        try:
            with self._scope:
                try:
                    self._result = await call_next(ctx)
                    self._error = None
                except Exception as error:
                    self._error = error
        finally:
            if self._handle is not None:
                self._extension.end(self._handle, **self._outcome())
            self._answered.set()

    def _outcome(self) -> dict[str, Any]:
        if self._scope.cancelled_caught:
            return {"status": "cancelled"}
        if self._error is None:
            return {"status": "completed", "result": _plain(self._result)}
        if isinstance(self._error, MCPError):
            error = self._error.error
        else:
            _log.error("a call that was answered with a handle failed", exc_info=self._error)
            error = MCPError(code=INTERNAL_ERROR, message="Internal error").error
        return {"status": "failed", "status_message": error.message, "error": _plain(error)}

    def cancel(self) -> None:
        self._scope.cancel()

    def defer(self) -> bool:
        if self._handle is None:
            self._first = self._handle = self._extension.issue(self)
        if self._handle is not None:
            self._scope.deadline = min(self._scope.deadline, anyio.current_time() + LONGEST_WAIT_S)
            self._answered.set()
        return self._handle is not None

    async def ask(self, requests: Mapping[str, Any]) -> dict[str, Any]:
        assert self._handle is not None, "a call asks once it is deferred"
        self._answers, self._told = {}, anyio.Event()
        self._handle = self._extension.change(
            self._handle, status="input_required", input_requests={key: _plain(one) for key, one in requests.items()}
        )
        await self._told.wait()
        return self._answers

    def take(self, answers: Mapping[str, Any]) -> None:
        """Answers to nothing that was asked are passed over."""
        assert self._handle is not None, "who knows its handle"
        asked = self._handle.input_requests or {}
        self._answers |= {key: answer for key, answer in answers.items() if key in asked}
        if not asked:
            return
        if left := {key: request for key, request in asked.items() if key not in self._answers}:
            self._handle = self._extension.change(self._handle, input_requests=left)
        else:
            self._handle = self._extension.change(self._handle, status="working", input_requests=None)
            self._told.set()


def _can_come_back(ctx: _Context) -> bool:
    capabilities = ctx.session.client_capabilities
    declared = capabilities.extensions if capabilities else None
    return ctx.protocol_version in _VERSIONS and TASKS in (declared or {})


def _plain(value: object) -> dict[str, Any]:
    """As it goes over the wire."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dict(cast(Mapping[str, Any], value or {}))
