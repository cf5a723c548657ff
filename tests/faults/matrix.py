"""What came of the rows, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.rows import ROWS, Row

__all__ = ["Matrix"]

_HEAD = ("Fault, in the middle of a pipeline", "Engine", "Lost, as it must be", "Also checked", "Outcome", "Seconds")


class _Came(NamedTuple):
    outcome: str
    seconds: float
    noticed_s: float | None


class Matrix:
    """A plugin of pytest. The table is shown at the end, and written to `markdown`."""

    def __init__(self, markdown: Path | None) -> None:
        self._markdown = markdown
        self._came: dict[str, _Came] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.failed and report.nodeid not in self._came):
            noticed = dict(report.user_properties).get("noticed_s")
            outcome = "holds" if report.passed else "does not hold"
            self._came[report.nodeid] = _Came(outcome, report.duration, noticed if isinstance(noticed, float) else None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [_HEAD, *(_cells(row, came) for row in ROWS if (came := self._of(row)))]
        if len(lines) == 1:
            return
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
        terminalreporter.section("fault matrix")
        for line in lines:
            terminalreporter.write_line("  ".join(map(str.ljust, line, widths)).rstrip())
        if self._markdown is not None:
            rows = [_HEAD, ["---"] * len(_HEAD), *lines[1:]]
            self._markdown.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")

    def _of(self, row: Row) -> _Came | None:
        return next((came for name, came in self._came.items() if name.endswith(f"[{row.name}]")), None)


def _cells(row: Row, came: _Came) -> tuple[str, ...]:
    noticed = "" if came.noticed_s is None or not row.fails else f", seen after {came.noticed_s:.1f}"
    lost = ", ".join(name for name, cause in row.fails.items() if cause != "upstream") or "nothing"
    return row.name, row.backends[-1], lost, row.beyond, came.outcome, f"{came.seconds:.0f}{noticed}"
