"""The entries of the writer's queues."""

from __future__ import annotations

from collections.abc import Callable

from rhapsody_mcp.ledger.records import Change
from rhapsody_mcp.ledger.store import Store
from rhapsody_mcp.ledger.worker_thread import ThreadFuture

__all__ = ["QueuedCall", "QueuedWrite"]


class QueuedWrite:
    """Changes that are written together or not at all.

    `committing` is set from the start of the commit to its end; a `withdrawn` write is not tried again.
    """

    def __init__(self, number: int, changes: tuple[Change, ...], done: ThreadFuture | None) -> None:
        self.number, self.changes, self.done = number, changes, done
        self.committing = self.withdrawn = False

    def resolve(self, error: BaseException | None = None) -> None:
        """Answer the caller, if one waits."""
        if self.done is not None:
            self.done.resolve(error=error)


class QueuedCall:
    """A function of the store, to be called once the writes up to number `after` are written, or cannot be."""

    def __init__(self, after: int, function: Callable[[Store], object], result: ThreadFuture) -> None:
        self.after, self.function, self.result = after, function, result
