"""MCP's Tasks extension: a client that declares the extension gets a handle for a long call, and polls for the result.

A task of the extension is a tool call, not a task of a session.
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

from rhapsody_mcp.protocol.task_store import Handle, HandleStore, InMemoryHandleStore
from rhapsody_mcp.toolsets.tooling.deferred import LONGEST_WAIT_S, current_call

__all__ = ["TASKS", "TasksExtension"]

TASKS = "io.modelcontextprotocol/tasks"
_VERSIONS = frozenset({"2026-07-28"})
_RESULT_LIFETIME_S = 3600.0
"""How long a result is kept after the end of its call."""
_MAX_HANDLES_PER_OWNER = 200

_log = logging.getLogger(__name__)
_Context = ServerRequestContext[Any, Any]


class _TaskParams(RequestParams):
    task_id: str


class _UpdateParams(_TaskParams):
    input_responses: dict[str, Any]


class TasksExtension(Extension):
    """Lives as long as the process, longer than a connection. Leaving `async with` ends calls in progress, but no task
    of a session.

    A call is answered with a handle when its tool calls `defer` (in `toolsets.tooling.deferred`). All other calls, and
    all calls of clients that do not declare the extension, are answered with their results.
    """

    identifier = TASKS

    def __init__(
        self, store: HandleStore | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._store: HandleStore = store or InMemoryHandleStore()
        self._now = now
        self._running: dict[str, _DeferrableCall] = {}
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

    # --- for the SDK

    def methods(self) -> Sequence[MethodBinding]:
        return [
            MethodBinding("tasks/get", _TaskParams, self._get, _VERSIONS),
            MethodBinding("tasks/update", _UpdateParams, self._update, _VERSIONS),
            MethodBinding("tasks/cancel", _TaskParams, self._cancel, _VERSIONS),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: _Context, call_next: CallNext
    ) -> HandlerResult:
        if not _supports_tasks(ctx):
            return await call_next(ctx)
        call = _DeferrableCall(self, authenticated_principal(ctx))
        self._group.start_soon(call.run, call_next, ctx)
        return await call.answer()

    async def _get(self, ctx: _Context, params: _TaskParams) -> HandlerResult:
        return {"resultType": "complete", **self._find(ctx, params.task_id).as_json()}

    async def _update(self, ctx: _Context, params: _UpdateParams) -> HandlerResult:
        handle = self._find(ctx, params.task_id)
        if (call := self._running.get(handle.task_id)) is not None:
            call.accept_answers(params.input_responses)
        return {"resultType": "complete"}

    async def _cancel(self, ctx: _Context, params: _TaskParams) -> HandlerResult:
        handle = self._find(ctx, params.task_id)
        if (call := self._running.get(handle.task_id)) is not None:
            call.cancel()
        return {"resultType": "complete"}

    def _find(self, ctx: _Context, task_id: str) -> Handle:
        """Raises MCPError; the text is the same for an unknown handle and for one of another owner."""
        require_client_extension(ctx, TASKS)
        headers = getattr(ctx.request, "headers", None)
        if headers is not None and headers.get("mcp-name") != task_id:
            raise MCPError(code=HEADER_MISMATCH, message="Mcp-Name header does not match params.taskId")
        self._store.drop_expired(self._now())
        handle = self._store.get(task_id)
        if handle is None or handle.owner != authenticated_principal(ctx):
            raise MCPError(code=INVALID_PARAMS, message="Failed to retrieve task: Task not found")
        return handle

    # --- for calls in progress

    def issue(self, call: _DeferrableCall) -> Handle | None:
        """A new, stored handle for the call; None where its owner has too many handles."""
        now = self._now()
        self._store.drop_expired(now)
        if self._store.count(call.owner) >= _MAX_HANDLES_PER_OWNER:
            return None
        handle = Handle(
            task_id=secrets.token_urlsafe(24),
            owner=call.owner,
            created_at=now,
            last_updated_at=now,
            ttl_ms=round((LONGEST_WAIT_S + _RESULT_LIFETIME_S) * 1000),
        )
        self._store.put(handle)
        self._running[handle.task_id] = call
        return handle

    def change(self, handle: Handle, **fields: Any) -> Handle:
        changed = handle.model_copy(update={**fields, "last_updated_at": self._now()})
        self._store.put(changed)
        return changed

    def end(self, handle: Handle, **fields: Any) -> None:
        """Store the end of the call; the lifetime of its result begins."""
        del self._running[handle.task_id]
        lifetime = self._now() - handle.created_at + timedelta(seconds=_RESULT_LIFETIME_S)
        self.change(handle, **fields, input_requests=None, ttl_ms=round(lifetime.total_seconds() * 1000))


class _DeferrableCall:
    """A call in progress. Its client is answered with the result, or earlier with a handle."""

    def __init__(self, extension: TasksExtension, owner: str | None) -> None:
        self.owner = owner
        self._extension = extension
        self._scope = anyio.CancelScope()
        self._answered = anyio.Event()
        self._handle_sent: Handle | None = None
        self._handle: Handle | None = None
        self._result: HandlerResult = None
        self._error: Exception | None = None
        self._answers: dict[str, Any] = {}
        self._all_answered = anyio.Event()

    async def answer(self) -> HandlerResult:
        """Wait for the reply: the result or a handle. Cancellation of this wait cancels the call."""
        try:
            await self._answered.wait()
        except anyio.get_cancelled_exc_class():
            self.cancel()
            raise
        if self._handle_sent is not None:
            return {"resultType": "task", **self._handle_sent.as_json()}
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
            return {"status": "completed", "result": _as_json(self._result)}
        if isinstance(self._error, MCPError):
            error = self._error.error
        else:
            _log.error("a call that was answered with a handle failed", exc_info=self._error)
            error = MCPError(code=INTERNAL_ERROR, message="Internal error").error
        return {"status": "failed", "status_message": error.message, "error": _as_json(error)}

    def cancel(self) -> None:
        self._scope.cancel()

    def defer(self) -> bool:
        if self._handle is None:
            self._handle_sent = self._handle = self._extension.issue(self)
        if self._handle is not None:
            self._scope.deadline = min(self._scope.deadline, anyio.current_time() + LONGEST_WAIT_S)
            self._answered.set()
        return self._handle is not None

    async def ask(self, requests: Mapping[str, Any]) -> dict[str, Any]:
        assert self._handle is not None, "a call asks once it is deferred"
        self._answers, self._all_answered = {}, anyio.Event()
        self._handle = self._extension.change(
            self._handle,
            status="input_required",
            input_requests={key: _as_json(request) for key, request in requests.items()},
        )
        await self._all_answered.wait()
        return self._answers

    def accept_answers(self, answers: Mapping[str, Any]) -> None:
        """Ignores answers to unknown questions."""
        assert self._handle is not None, "the client knows the handle"
        questions = self._handle.input_requests or {}
        self._answers |= {key: answer for key, answer in answers.items() if key in questions}
        if not questions:
            return
        if open_questions := {key: question for key, question in questions.items() if key not in self._answers}:
            self._handle = self._extension.change(self._handle, input_requests=open_questions)
        else:
            self._handle = self._extension.change(self._handle, status="working", input_requests=None)
            self._all_answered.set()


def _supports_tasks(ctx: _Context) -> bool:
    capabilities = ctx.session.client_capabilities
    declared = capabilities.extensions if capabilities else None
    return ctx.protocol_version in _VERSIONS and TASKS in (declared or {})


def _as_json(value: object) -> dict[str, Any]:
    """The JSON form of a result or an error."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dict(cast(Mapping[str, Any], value or {}))
