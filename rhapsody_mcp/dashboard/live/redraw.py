"""Draws a session again when it has changed, and not too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from threading import get_ident

from rhapsody_mcp.runtime.session.session import Session

__all__ = ["Redraw"]

_SETTLING = 5
"""A change is drawn after this part of the interval at the earliest."""
_MOST_LOAD = 20
"""A drawing is followed by a pause of so many times what it took, so that drawing takes 5 % of a core at most."""


class Redraw:
    """Calls `draw` after changes of a session, at most once in `interval_s`, and about every `open_s` while tasks have
    not ended.

    A change is drawn a little later, with what changes together with it. Timers of the event loop call `draw`: nothing
    is left that keeps a loop from its end. Without a running event loop, and for changes in another thread, only
    `draw_now` and `finish` draw.
    """

    def __init__(self, session: Session, draw: Callable[[], None], interval_s: float, open_s: float) -> None:
        self._session, self._draw, self._interval_s, self._open_s = session, draw, interval_s, open_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = get_ident()
        self._timer: asyncio.TimerHandle | None = None
        self._changed, self._due = False, 0.0

    def start(self) -> None:
        """Draw what has changed from now on, in the event loop that runs here."""
        try:
            self._loop, self._thread = asyncio.get_running_loop(), get_ident()
        except RuntimeError:
            self._loop = None
        self._session.watchers.add(self._note)
        self._wait_while_open()

    def stop(self) -> None:
        self._session.watchers.discard(self._note)
        self._cancel()

    def finish(self) -> None:
        """Draw at once where something has changed since the last time."""
        if self._changed:
            self.draw_now()

    def draw_now(self) -> None:
        self._cancel()
        self._changed, began = False, time.monotonic()
        self._draw()
        ended = time.monotonic()
        self._due = ended + max(self._interval_s, _MOST_LOAD * (ended - began))
        self._wait_while_open()

    def _note(self) -> None:
        if not self._changed:
            self._changed = True
            if get_ident() == self._thread:
                self._wait_until(max(self._due, time.monotonic() + self._interval_s / _SETTLING))

    def _wait_while_open(self) -> None:
        if self._note in self._session.watchers and self._session.unfinished:
            self._wait_until(max(self._due, time.monotonic() + self._open_s))

    def _wait_until(self, when: float) -> None:
        self._cancel()
        if self._loop is not None and not self._loop.is_closed():
            # in a context of its own, a kernel takes the output for that of the cell that runs then
            self._timer = self._loop.call_later(max(0.0, when - time.monotonic()), self.draw_now, context=Context())

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
