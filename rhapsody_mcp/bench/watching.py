"""What it costs to watch running tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.bench.measurement import Row
from rhapsody_mcp.model.live.output import OutputQuery

__all__ = ["watching_row"]

_TASKS = 100
_INTERVAL_S = 0.5
_PRINTS = "while :; do echo a line of output; sleep 0.5; done"
_END = OutputQuery((-4096, -4096), 4096)


@asynccontextmanager
async def watching_row(seconds: float) -> AsyncIterator[list[Row]]:
    async with Session([LocalExecutionBackend()]) as session:
        kwargs = {"cores": 0.01}
        tasks = [
            ComputeTask(executable="sh", arguments=["-c", _PRINTS], task_backend_specific_kwargs=kwargs)
            for _ in range(_TASKS)
        ]
        await session.submit_tasks(tasks)
        while not all([await session.read_output(task) for task in tasks]):  # noqa: ASYNC110 - a start is no event here
            await asyncio.sleep(_INTERVAL_S)
        name = f"the output of {_TASKS} running tasks, read twice a second"
        yield [Row(name, partial(_share, session, tasks, seconds), shown="share", warm_up=False)]


async def _share(session: Session, tasks: list[ComputeTask], seconds: float) -> float:
    """The share of one core that this process uses."""
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        read_at = time.perf_counter()
        for task in tasks:
            await session.read_output(task, _END)
        await asyncio.sleep(max(0.0, _INTERVAL_S - (time.perf_counter() - read_at)))
    return (time.process_time() - used) / (time.perf_counter() - began)
