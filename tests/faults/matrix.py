"""What came of the rows, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.pipeline import RUNNING
from tests.faults.rows import ROWS, Row

__all__ = ["Matrix"]

_HEAD = ("Fault, in the middle of a pipeline", "What must hold of the tasks", "Outcome")


class _Came(NamedTuple):
    holds: bool
    noticed_s: float | None


class Matrix:
    """A plugin of pytest. The table is shown at the end, and written to `markdown`."""

    def __init__(self, markdown: Path | None) -> None:
        self._markdown = markdown
        self._came: dict[str, _Came] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.failed and report.nodeid not in self._came):
            noticed = dict(report.user_properties).get("noticed_s")
            self._came[report.nodeid] = _Came(report.passed, noticed if isinstance(noticed, float) else None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [_HEAD, *self._lines()]
        if len(lines) == 1:
            return
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
        terminalreporter.section("fault matrix")
        for line in lines:
            terminalreporter.write_line("  ".join(map(str.ljust, line, widths)).rstrip())
        if self._markdown is not None:
            rows = [_HEAD, ["---"] * len(_HEAD), *lines[1:]]
            self._markdown.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")

    def _lines(self) -> list[tuple[str, ...]]:
        """One for all rows of the same line."""
        shared: dict[str, tuple[Row, list[_Came]]] = {}
        for row in ROWS:
            if came := self._of(row):
                shared.setdefault(row.line or row.name, (row, []))[1].append(came)
        return [(fault, _demand(row), _outcome(row, came)) for fault, (row, came) in shared.items()]

    def _of(self, row: Row) -> _Came | None:
        return next((came for name, came in self._came.items() if name.endswith(f"[{row.name}]")), None)


def _demand(row: Row) -> str:
    causes = [cause for cause in row.fails.values() if cause != "upstream"]
    if row.fails is RUNNING:
        loss = "what was running is lost or tried again, nothing else"
    elif not causes:
        loss = "all end as if nothing had happened" if not row.may_fail else "all end"
    else:
        failed = "its task fails" if len(causes) == 1 else f"{len(causes)} tasks fail"
        loss = f"only {failed}: {', '.join(dict.fromkeys(causes))}"
    return "; ".join(filter(None, (loss, row.beyond)))


def _outcome(row: Row, came: Sequence[_Came]) -> str:
    noticed = [one.noticed_s for one in came if one.noticed_s is not None]
    words = ["holds" if all(one.holds for one in came) else "does not hold"]
    if row.fails and row.name.startswith("SIG") and noticed:
        words.append(f"told after {max(noticed):.1f} s")
    return ", ".join(words)
