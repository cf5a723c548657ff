"""What waits for the thread of a ledger: changes to be written, and things to be done between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rhapsody_mcp.ledger.records import Change
from rhapsody_mcp.ledger.store import Store

__all__ = ["Entry", "Job", "Waiter"]


class Waiter:
    """Someone in an event loop who waits for something in the thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def tell(self, result: object = None, error: BaseException | None = None) -> None:
        """From the thread. Whoever has gone is not told."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end, result, error)

    def _end(self, result: object, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class Entry:
    """Changes that are written together, or not at all, and who waits for that.

    While it is `committing` the disk decides what becomes of it; `withdrawn`, it is not to be tried again.
    """

    def __init__(self, number: int, changes: tuple[Change, ...], waiter: Waiter | None) -> None:
        self.number, self.changes, self.waiter = number, changes, waiter
        self.committing = self.withdrawn = False

    def tell(self, error: BaseException | None = None) -> None:
        """Where someone waits for it."""
        if self.waiter is not None:
            self.waiter.tell(error=error)


class Job:
    """Something to do with the store once the changes up to `after` are written, or cannot be."""

    def __init__(self, after: int, work: Callable[[Store], object], waiter: Waiter) -> None:
        self.after, self.work, self.waiter = after, work, waiter
