"""Measures a growing session: a server in one process, with a ledger and a backend that ends each task at once.

python -m rhapsody_mcp.bench.growth COUNT
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
from mcp import Client

from rhapsody_mcp.backends.base import BackendBase, Ended, Kind, Report, Running
from rhapsody_mcp.bench.measurement import Row, Unit
from rhapsody_mcp.engine.process.gc_tuning import collect_less
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Reader, Value
from rhapsody_mcp.runtime.recovery.recorder import Storage
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import build_server
from rhapsody_mcp.settings import Settings

__all__ = ["Growth", "growth_rows"]

_BATCH_TASKS = 500
_FIRST_TASKS = 1000
_LAST_TASKS = 5000


class Growth(msgspec.Struct, frozen=True):
    """Measured on a session of `tasks` ended tasks: seconds a task among the first and the last ones, bytes a task in
    the server's memory, seconds for a page of list_tasks and for get_statistics."""

    tasks: int
    first_s: float
    last_s: float
    task_bytes: float
    page_s: float
    statistics_s: float


@asynccontextmanager
async def growth_rows(tasks: int) -> AsyncIterator[list[Row]]:
    runs: list[Growth] = []

    async def grow() -> Growth:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", __name__, str(tasks)], stdout=asyncio.subprocess.PIPE
        )
        stdout, _ = await process.communicate()
        if process.returncode:
            raise RhapsodyError(f"the benchmark's session of {tasks} tasks ended with exit code {process.returncode}")
        return msgspec.json.decode(stdout, type=Growth)

    async def last_s() -> float:
        runs.append(await grow())
        return runs[-1].last_s

    async def of_next_run(field: str) -> float:
        """The value of the next run of the first row, in turn."""
        runs.append(runs.pop(0))
        return cast(float, getattr(runs[-1], field))

    def row_of_runs(name: str, field: str, shown: Unit = "time") -> Row:
        return Row(name, partial(of_next_run, field), shown=shown, warm_up=False)

    first = partial(of_next_run, "first_s")
    yield [
        Row(f"a task in a session of {tasks:,}", last_s, first, bare=f"in one of {_FIRST_TASKS:,}", warm_up=False),
        row_of_runs("a page of list_tasks there", "page_s"),
        row_of_runs("get_statistics there", "statistics_s"),
        row_of_runs("a task that has ended, in memory", "task_bytes", "bytes"),
    ]


class _InstantBackend(BackendBase):
    """Ends each task in the next turn of the event loop."""

    name = "instant"
    kinds: tuple[Kind, ...] = ("function",)

    def check(self, spec: TaskSpec) -> None:
        pass

    async def start(self) -> None:
        pass

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        loop = asyncio.get_running_loop()
        for task_run in task_runs:
            loop.call_soon(_end, task_run.spec.uid, report)

    def cancel(self, uids: Collection[str]) -> None:
        pass

    async def _close(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name}


def _end(uid: str, report: Report) -> None:
    now = time.time()
    report(Running(uid, now))
    report(Ended(uid, Outcome(state=TaskState.DONE, started=now, ended=now, value=Value("json", "int", 1, b"1"))))


class _Client:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def call(self, tool: str, **arguments: Any) -> tuple[dict[str, Any], float]:
        """The structured reply, and the seconds until it arrives."""
        began = time.perf_counter()
        result = await self._client.call_tool(tool, arguments)
        took = time.perf_counter() - began
        if result.is_error:
            raise RhapsodyError(f"{tool} was refused in the benchmark: {result.content}")
        return cast(dict[str, Any], result.structured_content), took

    async def grow(self, session: str, count: int) -> float:
        """Run `count` more tasks; returns the seconds for each task."""
        took = 0.0
        for _ in range(0, count, _BATCH_TASKS):
            request = [{"function": "operator:index", "args": [number]} for number in range(_BATCH_TASKS)]
            submitted, submit_s = await self.call("submit_tasks", session=session, tasks=request)
            waited, wait_s = await self.call("wait_tasks", session=session, tasks=[submitted["last"]])
            assert waited["ended"]
            took += submit_s + wait_s
        return took / count


async def _measure(tasks: int) -> Growth:
    settings = Settings(budget_tasks=None, max_session_tasks=None, max_open_tasks=None, max_held_bytes=None)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ledger = Ledger(Path(folder))
        ledger.open()
        try:
            return await _measure_session(tasks, settings, Storage(ledger, Path(folder)))
        finally:
            await ledger.close()


async def _measure_session(tasks: int, settings: Settings, storage: Storage) -> Growth:
    async with SessionRegistry(lambda _: [_InstantBackend()], storage, settings=settings) as sessions:
        await sessions.restore()
        async with Client(build_server(settings, sessions)) as connected:
            client = _Client(connected)
            session = (await client.call("create_session"))[0]["session"]
            await client.grow(session, _BATCH_TASKS)
            first_s, before = await client.grow(session, _FIRST_TASKS - _BATCH_TASKS), _resident_bytes()
            last = min(_LAST_TASKS, tasks // 2)
            await client.grow(session, tasks - _FIRST_TASKS - last)
            last_s = await client.grow(session, last)
            task_bytes = (_resident_bytes() - before) / (tasks - _FIRST_TASKS)
            page_s = (await client.call("list_tasks", session=session))[1]
            statistics_s = (await client.call("get_statistics", session=session))[1]
            return Growth(tasks, first_s, last_s, task_bytes, page_s, statistics_s)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    collect_less()
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(_measure(int(sys.argv[1])))))
