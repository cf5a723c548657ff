"""Measures sessions in allocations of a simulated cluster, beside the same work without an allocation:

python -m tests.cluster.reach [--dragon]

Everything shares the cores of this machine, so the ratios of one run count, and times of the machine do not. Prints a
table in Markdown.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.runtime.backend_factory import SessionConfig, open_backends
from rhapsody_mcp.settings import Settings
from tests.cluster.cluster import Cluster

FUNCTIONS, SINGLES, SLEEPS, SLOTS = 10_000, 200, 1000, 16
ROUNDS, WORKERS = 7, 2
IDLE_S = 30.0
_TICKS = os.sysconf("SC_CLK_TCK")


def nothing() -> None:
    pass


def sleep() -> None:
    import time

    time.sleep(1)


def cpu_s(*words: str) -> float:
    """The CPU that all processes with these words in their command lines have used, in seconds."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if all(word in (folder / "cmdline").read_text().replace("\0", " ") for word in words):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return total / _TICKS


def machine_cpu_s() -> float:
    fields = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return sum(fields[index] for index in (0, 1, 2, 5, 6)) / _TICKS


@asynccontextmanager
async def session(cluster: Cluster, nodes: int = 2, backend: str = "local", **config: Any) -> AsyncIterator[Session]:
    """A session that has run one task on its nodes."""
    cluster.wait_until_idle()
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    backends = open_backends(SessionConfig(backends=(backend,), nodes=nodes, minutes=30, **config), Settings())
    folder = cluster.shared / f"session{time.time_ns()}"
    async with Session(backends, folder=folder) as opened:
        await run(opened, 1)
        yield opened


async def run(opened: Session, count: int, function: Callable[[], None] = nothing) -> list[ComputeTask]:
    tasks = [ComputeTask(function) for _ in range(count)]
    await opened.submit_tasks(tasks)
    await opened.wait_tasks(tasks)
    assert all(task.state.value == "DONE" for task in tasks)
    return tasks


async def functions(opened: Session, *owner: str) -> tuple[float, float]:
    """Microseconds of CPU for each function: of the machine, and of the dispatcher's process."""
    before, owned = machine_cpu_s(), cpu_s(*owner)
    await run(opened, FUNCTIONS)
    return (machine_cpu_s() - before) / FUNCTIONS * 1e6, (cpu_s(*owner) - owned) / FUNCTIONS * 1e6


async def one_function(opened: Session) -> float:
    """Milliseconds from the submission of one function to its result, the median."""
    times = []
    for _ in range(SINGLES):
        began = time.perf_counter()
        await run(opened, 1)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def busy_share(tasks: Sequence[ComputeTask], slots: int) -> float:
    """The share of the slots that ran a task, from the first start until no task waited any more."""
    spans = [(task.outcome.started or 0.0, task.outcome.ended) for task in tasks if task.outcome is not None]
    begin, end = min(start for start, _ in spans), max(start for start, _ in spans)
    busy = sum(min(ended, end) - start for start, ended in spans)
    return busy / (slots * (end - begin))


def row(work: str, measured: str, beside: str, ratio: float | str) -> None:
    told = f"{ratio:.2f}" if isinstance(ratio, float) else ratio
    sys.stdout.write(f"| {work} | {measured} | {beside} | {told} |\n")
    sys.stdout.flush()


async def throughput() -> None:
    """A session in an allocation and one without take turns, and the medians count."""
    with Cluster(2, cpus=1) as cluster:
        async with (
            Session([LocalExecutionBackend(num_workers=WORKERS)]) as direct,
            session(cluster, num_workers=WORKERS) as opened,
        ):
            cpu, singles = [], []
            for measured in range(-1, ROUNDS):
                beside = await functions(direct, "tests.cluster.reach")
                inside = await functions(opened, "backends.pilot.pilot")
                if measured >= 0:
                    cpu.append((*inside, *beside))
                    singles.append((await one_function(opened), await one_function(direct)))
            idle = {"pilot": "backends.pilot.pilot", "node agent": "engine.host"}
            before = {name: cpu_s(words) for name, words in idle.items()}
            await asyncio.sleep(IDLE_S)
            shares = {name: (cpu_s(words) - before[name]) / IDLE_S for name, words in idle.items()}
    all_cpu, pilot_cpu, all_beside, beside_cpu = (statistics.median(column) for column in zip(*cpu, strict=True))
    single, single_beside = (statistics.median(column) for column in zip(*singles, strict=True))
    rate, rate_beside = 1e6 / all_cpu, 1e6 / all_beside
    ratio = statistics.median(row[2] / row[0] for row in cpu)
    row(f"{FUNCTIONS:,} functions, a core-second of CPU", f"{rate:,.0f}", f"{rate_beside:,.0f}", ratio)
    row(
        "CPU of the dispatcher's process a function",
        f"{pilot_cpu:.0f} µs",
        f"{beside_cpu:.0f} µs",
        pilot_cpu / beside_cpu,
    )
    row("one function", f"{single:.2f} ms", f"{single_beside:.2f} ms", f"+{single - single_beside:.2f} ms")
    row("the idle pilot", f"{shares['pilot']:.2%} of a core", "", "")
    row("an idle node agent", f"{shares['node agent'] / 2:.2%} of a core", "", "")


async def utilization() -> None:
    """After a first wave, which waits for all workers: a backend is ready with its first worker."""
    for nodes in (2, 4, 8):
        slots = nodes * SLOTS
        with Cluster(nodes, cpus=SLOTS) as cluster:
            async with session(cluster, nodes, num_workers=slots) as opened:
                await run(opened, 2 * slots, sleep)
                share = busy_share(await run(opened, SLEEPS, sleep), slots)
        row(f"{SLEEPS:,} functions of 1 s on {nodes} nodes of {SLOTS} slots", f"{share:.1%} of the slots busy", "", "")


def dragon_start_s(cluster: Cluster) -> float:
    """The seconds from the start of a job on two nodes to the first line of a program that Dragon's launcher runs."""
    cluster.wait_until_idle()
    file = cluster.shared / "started"
    program = f"import time; print(time.time(), file=open({str(file)!r}, 'w'))"
    launcher = [str(Path(sys.executable).with_name("dragon")), "-m", "-w", "slurm", "-t", "tcp", "-N", "2"]
    command = shlex.join([*launcher, "--network-prefix", "^eth0$", sys.executable, "-c", program])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"export PATH={path} SLURM_WORKING_DIR=/tmp; date +%s.%N > {cluster.shared}/granted; {command}"
    cluster.run("sbatch", "--wait", "--nodes=2", "--exclusive", "--output=/dev/null", "--chdir=/tmp", "--wrap", script)
    return float(file.read_text()) - float((cluster.shared / "granted").read_text())


async def first_task_s(cluster: Cluster, backend: str) -> float:
    """The seconds from the start of the job to the end of the first task."""
    cluster.wait_until_idle()
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    backends = open_backends(SessionConfig(backends=(backend,), nodes=2, minutes=30), Settings())
    async with Session(backends, folder=cluster.shared / f"session{time.time_ns()}") as opened:
        await run(opened, 1)
        since: float = backends[0].describe()["allocation"]["since"]  # the scheduler tells whole seconds
        return time.time() - since


async def first_task() -> None:
    with Cluster(2) as cluster:
        row("allocation granted to first task done, local", f"{await first_task_s(cluster, 'local'):.0f} s", "", "")
        if "--dragon" in sys.argv:
            pairs = [(await first_task_s(cluster, "dragon"), dragon_start_s(cluster)) for _ in range(3)]
            took, beside = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(took / beside for took, beside in pairs)
            row("the same, dragon, beside Dragon's own start", f"{took:.0f} s", f"{beside:.0f} s", ratio)


async def main() -> None:
    sys.stdout.write("| work | in an allocation | beside it | ratio |\n|---|---|---|---|\n")
    await throughput()
    await utilization()
    await first_task()


asyncio.run(main())
