"""Makes the facts of a reply durable before the reply is sent."""

from __future__ import annotations

from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext

from rhapsody_mcp.runtime.session_registry import SessionRegistry

__all__ = ["durable_replies"]

_FLUSH_TIMEOUT_S = 1.0
_METHODS = ("tools/call", "resources/read", "resources/subscribe", "prompts/get", "completion/complete", "tasks/get")


def durable_replies(sessions: SessionRegistry) -> ServerMiddleware[Any]:
    """Middleware: a request waits until the sessions of the ledger are restored, and a reply until the ledger holds all
    that happened before it. A reply does not wait for a ledger that cannot be written; sessions then say so."""

    async def middleware(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method not in _METHODS:
            return await call_next(ctx)
        await sessions.restored.wait()
        result = await call_next(ctx)
        if sessions.ledger is not None and not sessions.ledger.problem:
            await sessions.ledger.flush(_FLUSH_TIMEOUT_S)
        return result

    return middleware
