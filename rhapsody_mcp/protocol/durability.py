"""Lets no reply say what the next life of the service would not know."""

from __future__ import annotations

from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext

from rhapsody_mcp.runtime.session_registry import SessionRegistry

__all__ = ["durable_replies"]

_WITHIN_S = 1.0
_TELLING = ("tools/call", "resources/read", "resources/subscribe", "prompts/get", "completion/complete", "tasks/get")


def durable_replies(sessions: SessionRegistry) -> ServerMiddleware[Any]:
    """Requests wait until the sessions of an earlier life are here. A reply waits until what it may tell is in the
    ledger, but not for a ledger that cannot be written: what ends meanwhile is told, and the session says so."""

    async def middleware(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method not in _TELLING:
            return await call_next(ctx)
        await sessions.restored.wait()
        result = await call_next(ctx)
        if sessions.ledger is not None and not sessions.ledger.problem:
            await sessions.ledger.settled(_WITHIN_S)
        return result

    return middleware
