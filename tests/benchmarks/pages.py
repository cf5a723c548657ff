"""What open pages cost the service: the same functions with and without ten pages, in turn.

python -m tests.benchmarks.pages [PAIRS]
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from statistics import median

import httpx2
from mcp import Client

from tests.behaviour.test_http import call, connected, serving

_PAGES = 10
_TASKS = 45_000
_FUNCTION = "def same(n):\n    return n"
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


async def main(pairs: int) -> None:
    with serving("--port", "0") as (server, address):
        async with connected(address, "auto") as client:
            figures: dict[int, list[tuple[float, float]]] = {0: [], _PAGES: []}
            for number in range(2 * pairs):
                pages = _PAGES if number % 2 else 0
                figures[pages].append(await _run(client, address, server.pid, f"run-{number}", pages))
    without, with_pages = ([median(column) for column in zip(*runs, strict=True)] for runs in figures.values())
    extra = with_pages[1] - without[1]
    sys.stdout.write(
        f"tasks a second: {_TASKS / without[0]:,.0f} without pages, {_TASKS / with_pages[0]:,.0f} with {_PAGES}\n"
        f"CPU of the service: {extra / _TASKS * 1e6:.1f} us more a task, {extra / with_pages[0]:.1%} of a core\n"
        f"time: {with_pages[0] / without[0]:.3f} times\n"
    )


async def _run(client: Client, address: str, pid: int, session: str, pages: int) -> tuple[float, float]:
    """The seconds that the functions took, and the CPU seconds of the service."""
    await call(client, "create_session", name=session, backends=["local"])
    await call(client, "submit_tasks", session=session, tasks=[{"name": "warm", "source": _FUNCTION, "args": [1]}])
    await call(client, "wait_tasks", session=session)
    dashboard = f"{address.removesuffix('/mcp')}/dashboard"
    events = f"{dashboard}/events?session={session}"
    watching = [await asyncio.create_subprocess_exec("curl", "-sNo", os.devnull, events) for _ in range(pages)]
    tables = asyncio.create_task(_ask_for_tables(f"{dashboard}/tasks?session={session}&limit=50", pages))
    await asyncio.sleep(1)
    sweep = {"name": "sweep", "source": _FUNCTION, "for_each": list(range(_TASKS)), "args": [{"item": True}]}
    began, cpu = time.perf_counter(), _cpu_s(pid)
    await call(client, "submit_tasks", session=session, tasks=[sweep], force=True)
    while not (await call(client, "wait_tasks", session=session, timeout_s=50))["ended"]:
        pass
    seconds, cpu_s = time.perf_counter() - began, _cpu_s(pid) - cpu
    tables.cancel()
    for page in watching:
        page.kill()
        await page.wait()
    await call(client, "close_session", session=session)
    return seconds, cpu_s


async def _ask_for_tables(address: str, pages: int) -> None:
    """Ask for the table of tasks as pages do: each every 2 s."""
    async with httpx2.AsyncClient() as client:
        while True:
            for _ in range(pages):
                (await client.get(address)).raise_for_status()
            await asyncio.sleep(2)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4))
