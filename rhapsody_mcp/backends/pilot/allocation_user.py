"""What an allocation expects of the backends that run in it."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from rhapsody_mcp.backends.pilot.messages import Body, FromPilot

__all__ = ["AllocationUser"]


class AllocationUser(Protocol):
    """A backend that runs in the allocation."""

    name: str

    @property
    def is_waiting(self) -> bool:
        """Whether no task of the backend runs in the allocation."""

    def receive(self, message: FromPilot) -> Awaitable[None] | None:
        """Take a message of the pilot. The message counts as delivered when the returned awaitable is done."""

    def lose(self, reason: str, unsent: Sequence[Body], *, is_replaced: bool = False) -> None:
        """The pilot is gone, and never got the messages `unsent`; with `is_replaced` another one is there."""
