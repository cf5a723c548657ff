"""Lets the client go before a tool waits: the client gets a handle, and comes back for the result."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

__all__ = ["LONGEST_WAIT_S", "Deferrable", "ask_later", "current_call", "defer"]

LONGEST_WAIT_S = 12 * 3600.0
"""The longest that a deferred call may run."""


class Deferrable(Protocol):
    """A call whose client can come back for the result."""

    def defer(self) -> bool:
        """Let the client go; False where the client has too many handles, and waits."""
        ...

    async def ask(self, requests: Mapping[str, Any]) -> dict[str, Any]:
        """The client's answer to each request, which the client finds when it comes back."""
        ...


current_call: ContextVar[Deferrable | None] = ContextVar("current_call", default=None)
"""The call that this code runs for, where its client can come back."""


def defer() -> bool:
    """Let the client go, as the call asks no more and waits from here on. False where the client stays."""
    call = current_call.get()
    return call is not None and call.defer()


async def ask_later(requests: Mapping[str, Any]) -> dict[str, Any]:
    """The answers to these requests. Raises LookupError for a call that cannot be deferred."""
    call = current_call.get()
    if call is None or not call.defer():
        raise LookupError("nobody comes back to answer")
    return await call.ask(requests)
