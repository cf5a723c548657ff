"""A session in the cells of a notebook, drawn again as it changes, without a widget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast
from uuid import uuid4

from rhapsody_mcp.dashboard.live.redraw import Redraw
from rhapsody_mcp.runtime.session.session import Session

__all__ = ["NotebookDisplay", "Shell", "kernel_shell"]

_INTERVAL_S = 1.0
_OPEN_S = 5.0
_END_OF_CELL = "post_run_cell"


class Publisher(Protocol):
    """IPython's way to a frontend."""

    def publish(
        self,
        data: Mapping[str, str],
        metadata: Mapping[str, Any] | None = None,
        *,
        transient: Mapping[str, str] | None = None,
        update: bool = False,
    ) -> None:
        """Send an output, or with `update` what takes the place of all outputs with the same `display_id`."""


class Events(Protocol):
    """IPython's events."""

    def register(self, event: str, function: Callable[..., object]) -> None:
        """Have the function called at each of these events."""

    def unregister(self, event: str, function: Callable[..., object]) -> None:
        """The opposite."""


class Shell(Protocol):
    """IPython, as a display uses it."""

    @property
    def display_pub(self) -> Publisher: ...
    @property
    def events(self) -> Events: ...


def kernel_shell() -> Shell | None:
    """The shell of the kernel that this process is; None elsewhere, also in IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return cast(Shell, shell) if hasattr(shell, "kernel") else None


class NotebookDisplay:
    """Every cell that shows the session is drawn again when the session changes, and at the end of each cell that runs,
    so that an executed notebook holds what its last cell left."""

    def __init__(self, session: Session, shell: Shell, html: Callable[[], str]) -> None:
        self._session, self._shell, self._html = session, shell, html
        self._id = f"rhapsody-{uuid4().hex}"
        self._redraw = Redraw(session, self._update, _INTERVAL_S, _OPEN_S)
        self._is_watching = False

    def show(self) -> None:
        """Add an output to the cell that runs."""
        self._publish(update=False)
        if self._session.closed and not self._session.unfinished:
            return
        if not self._is_watching:
            self._is_watching = True
            self._shell.events.register(_END_OF_CELL, self._end_cell)
        self._redraw.start()

    def _publish(self, update: bool) -> None:
        data = {"text/html": self._html(), "text/plain": repr(self._session)}
        self._shell.display_pub.publish(data, {}, transient={"display_id": self._id}, update=update)

    def _update(self) -> None:
        self._publish(update=True)

    def _end_cell(self, *_: object) -> None:
        is_over = self._session.closed and not self._session.unfinished
        if is_over:
            self._redraw.draw_now()
            self._is_watching = False
            self._redraw.stop()
            self._shell.events.unregister(_END_OF_CELL, self._end_cell)
        else:
            self._redraw.finish()
