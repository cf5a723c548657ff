"""Bars in a terminal for the tasks of a session and for each group of them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rhapsody_mcp.dashboard.live.redraw import Redraw
from rhapsody_mcp.dashboard.spans import STATES, group_of
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.runtime.tasks.task_html import duration, rounded

__all__ = ["terminal_progress"]

_INTERVAL_S, _OPEN_S = 0.25, 1.0
_GROUPS_SHOWN = 8
_NAME_CHARS, _BAR_WIDTH = 24, 16
_SHOWN = {"FAILED": "red", "RUNNING": "blue", "DONE": "green", "CANCELED": "yellow", "skipped": "dim"}
"""In the order of importance: a narrow terminal has no room for the last ones."""


@contextmanager
def terminal_progress(view: SessionView, console: Console | None = None) -> Iterator[None]:
    """Show the bars for as long as the context is open; where nothing can be drawn anew, one line at the end. The
    default console is on stderr."""
    console = console or Console(stderr=True)
    began, ended = time.monotonic(), _ended(sum(_groups(view).values(), Counter[str]()))

    def bars() -> Group:
        return _bars(_groups(view), time.monotonic() - began, ended)

    if not console.is_interactive:
        try:
            yield
        finally:
            counts = sum(_groups(view).values(), Counter[str]())
            line = f"{view.name}: {_states_text(counts).plain} after {duration(time.monotonic() - began)}"
            console.print(Text(_printable(line)), soft_wrap=True)
        return
    # what the program prints goes above the bars, unless it goes elsewhere
    with Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(), get_renderable=bars) as live:
        redraw = Redraw(view.session, live.refresh, _INTERVAL_S, _OPEN_S)
        redraw.draw_now()
        redraw.start()
        try:
            yield
        finally:
            redraw.stop()


def _groups(view: SessionView) -> dict[str, Counter[str]]:
    """How many tasks of each group are in each state."""
    view.catch_up_now()
    groups = view.group_counts()
    for task in view.open_tasks():
        groups.setdefault(group_of(task), Counter())[task.state.value] += 1
    return groups


def _bars(groups: Mapping[str, Counter[str]], elapsed_s: float, ended_before: int) -> Group:
    """`ended_before` tasks are not part of the rate."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column()  # takes what room there is
    counts = sum(groups.values(), Counter[str]())
    ended = max(0, _ended(counts) - ended_before)
    rate = f", {rounded(ended / elapsed_s)} tasks a second" if ended and elapsed_s else ""
    table.add_row("all tasks", *_row(counts))
    if len(groups) > 1:
        shown = sorted(groups, key=lambda name: _ended(groups[name]) == groups[name].total())[:_GROUPS_SHOWN]
        for name in groups:
            if name in shown:
                table.add_row(Text(_short(name)), *_row(groups[name]))
        if len(groups) > len(shown):
            table.add_row(Text(f"{len(groups) - len(shown)} more groups", style="dim"))
    return Group(table, Text(f"{duration(round(elapsed_s))}{rate}", style="dim"))


def _row(counts: Counter[str]) -> tuple[ProgressBar, Text, Text]:
    total, ended = counts.total(), _ended(counts)
    bar = ProgressBar(total=max(1, total), completed=ended, width=_BAR_WIDTH)
    return bar, Text(f"{ended:,}/{total:,}"), _states_text(counts)


def _ended(counts: Mapping[str, int]) -> int:
    return sum(counts.get(state, 0) for state in STATES)


def _states_text(counts: Mapping[str, int]) -> Text:
    waiting = sum(counts.values()) - sum(counts.get(state, 0) for state in _SHOWN)
    parts = [Text(f"{counts[state]:,} {state}", style=style) for state, style in _SHOWN.items() if counts.get(state)]
    parts += [Text(f"{waiting:,} waiting", style="dim")] if waiting else []
    return Text(", ", no_wrap=True, overflow="ellipsis").join(parts)


def _short(name: str) -> str:
    return _printable(name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…")


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
