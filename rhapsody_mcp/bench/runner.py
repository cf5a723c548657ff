"""Runs the benchmark row by row and reports it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from rhapsody_mcp import __version__
from rhapsody_mcp.bench.compute import compute_rows, dragon_ready
from rhapsody_mcp.bench.crowd import crowd_row
from rhapsody_mcp.bench.growth import growth_rows
from rhapsody_mcp.bench.measurement import Measurement, Row, load_of_machine, measure
from rhapsody_mcp.bench.prompts import prompt_rows
from rhapsody_mcp.bench.report import Report, draw, show, write_json
from rhapsody_mcp.bench.service import first_reply, service_rows
from rhapsody_mcp.bench.watching import watching_row
from rhapsody_mcp.model.errors import RhapsodyError

__all__ = ["FULL", "QUICK", "Size", "run_bench"]


@dataclass(frozen=True)
class Size:
    """The sizes of the workloads, and the number of runs. Without prompts no model server is started."""

    runs: int
    functions: int
    programs: int
    same_prompts: int
    other_prompts: int
    tasks: int
    workers: int
    idle_s: float


FULL = Size(5, 10_000, 200, 1000, 256, 100_000, 1000, 10)
QUICK = Size(5, 1000, 10, 32, 8, 2500, 100, 0.3)
_FILE_WIDTH = 160  # of a table that is written to a file


def _stages(size: Size) -> Sequence[AbstractAsyncContextManager[list[Row]]]:
    stages: list[AbstractAsyncContextManager[list[Row]]] = [
        compute_rows(size.functions, size.programs),
        dragon_ready(),
        service_rows(size.functions, size.idle_s),
        first_reply(),
        growth_rows(size.tasks),
        crowd_row(size.workers, size.functions),
        watching_row(size.idle_s),
    ]
    if size.same_prompts and find_spec("vllm") is not None:
        stages.insert(-3, prompt_rows(size.same_prompts, size.other_prompts))
    return stages


async def run_bench(size: Size, json_file: Path | None, chart: Path | None) -> int:
    """Returns the exit code. Raises RhapsodyError where a workload cannot run here."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    if chart is not None and find_spec("matplotlib") is None:
        raise RhapsodyError("a chart needs matplotlib: pip install 'rhapsody-mcp[bench]'. Nothing was measured.")
    before = load_of_machine()
    figures = await _measure(size, console)
    report = Report(
        version=__version__,
        command=" ".join(["rhapsody-mcp", *sys.argv[1:]]),
        machine=f"{platform.node()}: {platform.machine()}, Python {platform.python_version()}",
        before=before,
        after=load_of_machine(),
        figures=figures,
    )
    show(report, console)
    if json_file is not None:
        write_json(report, json_file)
    if chart is not None:
        draw(report, chart)
    return 0


async def _measure(size: Size, console: Console) -> Sequence[Measurement]:
    figures: list[Measurement] = []
    with console.status("") as status:
        for stage in _stages(size):
            status.update("the next engines start")
            async with stage as rows:
                for row in rows:
                    status.update(row.name)
                    figures.append(await measure(row, size.runs))
    return figures
