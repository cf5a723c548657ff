"""Runs the same works through others and through us, in turn, on this machine.

    python -m tests.benchmarks.compare --environments FOLDER --rounds 3

Each contestant has a Python environment of its own in FOLDER, which is made where it is not there, with the newest
version that the package registry gives. In each round each contestant is started, does each of its works once without
being measured and once measured, and is stopped, so that none runs beside another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from rhapsody_mcp.engine.process.shared_memory import unlink_unused
from tests.processes import dragon_files

_RIVALS = Path(__file__).with_name("rivals")
_DRAGON = "dragonhpc[batch,telemetry]==0.15.*"
_READY_S, _WORK_S, _GRACE_S = 90.0, 45.0, 20.0
_ALONE = 20  # times that one function is run by itself


@dataclass(frozen=True)
class Contestant:
    """`counts` are how often it does each work: fewer where it is slow, so that a round takes seconds."""

    name: str
    program: str
    packages: Sequence[str] = ()
    under_dragon: bool = False
    counts: dict[str, int] = field(default_factory=dict)


_FEW = {"functions": 40, "programs": 10, "job": 4}
_MANY = {"functions": 10_000, "programs": 200, "job": 4}
_SOME = {"functions": 2000, "programs": 100}
_PROMPTS = {"prompts": 256}
CONTESTANTS = [
    Contestant("rhapsody-mcp", "ours", counts=_MANY),
    Contestant("rhapsody-py", "rhapsody_py", ["rhapsody-py[dragon]"], True, _FEW),
    Contestant("Dragon, native Pool and processes", "dragon_pool", [_DRAGON], True, _MANY),
    Contestant("Dragon Batch", "dragon_batch", [_DRAGON], True, _FEW),
    Contestant("concurrent.futures", "futures", counts=_MANY),
    Contestant("Parsl HTEX", "parsl_htex", ["parsl"], counts=_SOME),
    Contestant("Dask distributed", "dask_distributed", ["dask[distributed]"], counts=_SOME),
    Contestant("rhapsody-mcp, on vLLM", "ours_prompts", counts=_PROMPTS),
    Contestant("vLLM, its server", "vllm_server", counts=_PROMPTS),
    Contestant("vLLM, LLM.chat", "vllm_generate", counts=_PROMPTS),
]


class _Running:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.works: Collection[object] = ()

    async def hear(self) -> dict[str, object]:
        """Raises EOFError where it has ended."""
        if not (line := await self._reader.readline()):
            raise EOFError
        told: dict[str, object] = json.loads(line)
        return told

    async def take(self, work: str, count: int) -> float:
        """The seconds that it says."""
        self._writer.write(json.dumps({"work": work, "count": count}).encode() + b"\n")
        async with asyncio.timeout(_WORK_S):
            return float(str((await self.hear())["seconds"]))

    def dismiss(self) -> None:
        self._writer.close()


@asynccontextmanager
async def _started(contestant: Contestant, python: Path) -> AsyncIterator[_Running]:
    arrived: asyncio.Future[_Running] = asyncio.get_running_loop().create_future()
    with tempfile.TemporaryDirectory(prefix="compare-", dir="/tmp") as folder:
        address = f"{folder}/orders"
        server = await asyncio.start_unix_server(lambda *ends: arrived.set_result(_Running(*ends)), address)
        launcher = [str(python.with_name("dragon")), "-s"] if contestant.under_dragon else []
        command = [*launcher, str(python), str(_RIVALS / f"{contestant.program}.py"), address]
        nothing = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            cwd=folder,
            process_group=0,
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
                "PYTHONPATH": str(_RIVALS),  # their own processes import what is there, too
            },
        )
        ended = asyncio.ensure_future(process.wait())
        try:
            async with asyncio.timeout(_READY_S):
                either: list[asyncio.Future[Any]] = [arrived, ended]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not arrived.done():
                    raise EOFError
                running = await arrived
                running.works = cast(Collection[object], (await running.hear())["works"])
            yield running
            running.dismiss()
            async with asyncio.timeout(_GRACE_S):
                await asyncio.shield(ended)
        finally:
            server.close()
            with suppress(ProcessLookupError):  # what it left, too: vLLM's engine, for one
                os.killpg(process.pid, signal.SIGKILL)
            await ended
            unlink_unused(dragon_files(process.pid))


async def _round(contestant: Contestant, python: Path, seconds: dict[tuple[str, str], list[float]]) -> str:
    """What went wrong, in words; empty where nothing did."""
    doing = "the start"
    try:
        async with _started(contestant, python) as running:
            for work, count in contestant.counts.items():
                if work not in running.works:
                    continue
                doing = work
                await running.take(work, count if work == "job" else max(2, count // 20))
                seconds[contestant.name, work].append(await running.take(work, count))
                for _ in range(_ALONE if work == "functions" else 0):
                    seconds[contestant.name, "one function"].append(await running.take(work, 1))
    except (TimeoutError, EOFError) as error:
        within_s = _READY_S if doing == "the start" else _WORK_S
        why = f"did not end within {within_s:g} s" if isinstance(error, TimeoutError) else "ended it"
        return f"{contestant.name}: {doing} {why}"
    return ""


def _environment(contestant: Contestant, folder: Path) -> Path:
    """The Python of it; made where it is not there."""
    if not contestant.packages:
        return Path(sys.executable)
    python = folder / contestant.program / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / contestant.program)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *contestant.packages], check=True)
    return python


def _version(contestant: Contestant, python: Path) -> str:
    if not contestant.packages:
        return ""
    package = contestant.packages[0].split("[")[0]
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _show(versions: dict[str, str], seconds: dict[tuple[str, str], list[float]], console: Console) -> None:
    table = Table("", "functions", "one function", "programs", "a job of 4 ranks", "prompts")
    for contestant in CONTESTANTS:
        counts = {**contestant.counts, "job": 0, "one function": 0}
        works = ("functions", "one function", "programs", "job", "prompts")
        cells = [_told(seconds.get((contestant.name, work)), counts.get(work, 0)) for work in works]
        table.add_row(f"{contestant.name} {versions[contestant.name]}".strip(), *cells)
    console.print(table)


def _told(values: list[float] | None, count: int) -> str:
    """A rate where there was a count, else a time, each a median."""
    if not values:
        return "-"
    median = statistics.median(values)
    if not count:
        return f"{median * 1000:.2f} ms"
    return f"{count / median:,.{0 if count / median >= 10 else 1}f}/s"


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare")
    parser.add_argument("--environments", type=Path, required=True, help="a folder for theirs; made if it is not there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="beginnings of names")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    chosen = [one for one in CONTESTANTS if not options.only or one.name.startswith(tuple(options.only))]
    pythons = {one.name: _environment(one, options.environments.absolute()) for one in chosen}
    versions = {one.name: _version(one, pythons[one.name]) if one in chosen else "" for one in CONTESTANTS}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for contestant in chosen:
            if problem := await _round(contestant, pythons[contestant.name], seconds):
                console.print(f"round {number + 1}: {problem}")
    _show(versions, seconds, console)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
