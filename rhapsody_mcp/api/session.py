"""The session as Python users have it: one that shows itself in notebooks and terminals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rhapsody_mcp.backends.base import OF_ASYNCFLOW
from rhapsody_mcp.dashboard.archive import write_whole
from rhapsody_mcp.dashboard.live.notebook import NotebookDisplay, Shell, kernel_shell
from rhapsody_mcp.dashboard.live.session_html import session_html
from rhapsody_mcp.dashboard.picture import stream_svg
from rhapsody_mcp.dashboard.report import write_report
from rhapsody_mcp.dashboard.trace import chrome_trace
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.errors import refuse_attribute
from rhapsody_mcp.runtime.session import session

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Session"]

_ELSEWHERE = {
    **OF_ASYNCFLOW,
    "add_backend": "Session(backends=[...]) takes all backends of the session",
    "get_telemetry": "session.get_statistics() has times and rates, session.report(file) a page",
    "start_telemetry": "session.get_statistics() has times and rates, session.report(file) a page, and the variables "
    "of OpenTelemetry turn on traces (docs/operation.md)",
}
"""Names that users of rhapsody-py know, or that AsyncFlow looks for, and what takes their place."""


class Session(session.Session):
    """Runs tasks on one or more backends.

    Leaving `async with session`, or `close()`, cancels unfinished tasks and stops the backends. In a notebook a session
    as the last line of a cell shows its tasks, and goes on showing what becomes of them.
    """

    def report(self, file: str | os.PathLike[str]) -> Path:
        """Write the report of all tasks until now: one HTML file that needs no network. Also after `close()`.

        As with `trace` and `picture`, an old file is replaced by a whole new one that only this user can read. Raises
        OSError.
        """
        return _write(file, write_report(self._caught_up(), {}).encode("utf-8", "replace"))

    def trace(self, file: str | os.PathLike[str]) -> Path:
        """Write the tasks that have ended as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing."""
        return _write(file, chrome_trace(self._caught_up()))

    def picture(self, file: str | os.PathLike[str]) -> Path:
        """Write the picture of the task stream, as SVG."""
        return _write(file, stream_svg(self._caught_up()).encode("utf-8", "replace"))

    @contextmanager
    def show_progress(self, console: Console | None = None) -> Iterator[None]:
        """Show bars on stderr for the tasks of the session and for each group of them, as long as the context is open;
        in a notebook what the session shows of itself.

        Where stderr is no terminal, one line is printed at the end.
        """
        if console is None and (shell := kernel_shell()) is not None:
            self._display(shell)
            yield
        else:
            from rhapsody_mcp.dashboard.live.terminal import terminal_progress  # here: it takes time

            with terminal_progress(self._view, console):
                yield

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.counts.items()) or "no tasks"
        return f"<Session {self.uid}{' (closed)' * self.closed}: {counts}>"

    def _repr_html_(self) -> str:
        return session_html(self._caught_up())

    def _ipython_display_(self) -> None:
        if (shell := kernel_shell()) is None:
            raise NotImplementedError  # so that IPython in a terminal shows the repr
        self._display(shell)

    def _display(self, shell: Shell) -> None:
        if self._shown is None:
            self._shown = NotebookDisplay(self, shell, self._repr_html_)
        self._shown.show()

    def __getattr__(self, name: str) -> NoReturn:
        refuse_attribute(self, name, _ELSEWHERE)

    _shown: NotebookDisplay | None = None

    @cached_property
    def _view(self) -> SessionView:
        return SessionView(self, self.uid)

    def _caught_up(self) -> SessionView:
        self._view.catch_up_now()
        return self._view


def _write(file: str | os.PathLike[str], content: bytes) -> Path:
    path = Path(file)
    write_whole(path, content)
    return path
