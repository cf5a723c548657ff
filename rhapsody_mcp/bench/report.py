"""Reports the measurements as a table, as JSON, and as a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rhapsody_mcp.bench.measurement import Measurement, Range, Unit

__all__ = ["Report", "draw", "show", "write_json"]


class Report(msgspec.Struct, frozen=True):
    """A whole run, with its command, and the machine's load before and after it."""

    version: str
    command: str
    machine: str
    before: str
    after: str
    figures: Sequence[Measurement]


def show(report: Report, console: Console) -> None:
    table = Table("work", "ours", "limit", "times the limit", "what the limit is", title=escape(report.machine))
    for figure in report.figures:
        table.add_row(
            figure.name,
            _format_range(figure, figure.ours),
            _format_range(figure, figure.limit),
            _ratio(figure),
            escape(figure.bare),
        )
    console.print(table)
    console.print(f"Medians of {max(figure.runs for figure in report.figures)} runs, and their spread.", style="dim")
    console.print(f"Before: {report.before}. After: {report.after}.", style="dim", markup=False)


def _ratio(figure: Measurement) -> str:
    return "" if figure.times is None else f"{figure.times:.2f}"


def _format_range(figure: Measurement, values_range: Range | None) -> str:
    if values_range is None:
        return ""
    values = (values_range.median, values_range.least, values_range.most)
    if figure.shown == "rate":
        values = (
            figure.count / values_range.median,
            figure.count / values_range.most,
            figure.count / values_range.least,
        )
    median, least, most = (_FORMATS[figure.shown](value) for value in values)
    return f"{median} ({least} to {most})"


def _seconds(value: float) -> str:
    return f"{value * 1000:.2f} ms" if value < 1 else f"{value:.2f} s"


_FORMATS: dict[Unit, Callable[[float], str]] = {
    "rate": lambda value: f"{value:,.0f}/s",
    "time": _seconds,
    "share": lambda value: f"{value:.1%}",
    "bytes": lambda value: f"{value / 1e6:,.1f} MB" if value > 1e6 else f"{value:,.0f} bytes",
}


def write_json(report: Report, file: Path) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def draw(report: Report, file: Path) -> None:
    """Draw a bar for each row, from 1 to its ratio to the limit. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    rows = [figure for figure in reversed(report.figures) if figure.times is not None]
    picture = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = picture.subplots()
    times = [row.times or 0 for row in rows]
    axes.barh([row.name for row in rows], [ratio - 1 for ratio in times], left=1, color="#4477aa")
    for height, (ratio, row) in enumerate(zip(times, rows, strict=True)):
        side = "left" if ratio >= 1 else "right"
        axes.text(ratio, height, f" {_ratio(row)} ", va="center", ha=side)
    axes.axvline(1, color="#bb5566")
    axes.set_xscale("log")
    axes.set_xlabel("times as long as the barest program (1: the limit)")
    axes.margins(x=0.15)
    picture.savefig(file, dpi=120)
