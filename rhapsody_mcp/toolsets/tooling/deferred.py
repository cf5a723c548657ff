"""How a tool lets its client go before it waits: the client has a handle, and comes back for the result."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

__all__ = ["LONGEST_WAIT_S", "Deferrable", "ask_later", "current_call", "defer"]

LONGEST_WAIT_S = 12 * 3600.0
"""How long a call may go on whose client was let go."""


class Deferrable(Protocol):
    """A call whose client can come back for the result."""

    def defer(self) -> bool:
        """Let the client go; False where it has too many handles, and waits."""
        ...

    async def ask(self, requests: Mapping[str, Any]) -> dict[str, Any]:
        """The client's answer to each of these requests, which it finds when it comes back."""
        ...


current_call: ContextVar[Deferrable | None] = ContextVar("current_call", default=None)
"""The call that this code runs for, where its client can come back."""


def defer() -> bool:
    """Say that the call waits from here on, all questions being answered. True where its client was let go."""
    call = current_call.get()
    return call is not None and call.defer()


async def ask_later(requests: Mapping[str, Any]) -> dict[str, Any]:
    """The answers to these requests; only a call that was deferred can ask in this way."""
    call = current_call.get()
    if call is None or not call.defer():
        raise LookupError("nobody comes back to answer")
    return await call.ask(requests)
