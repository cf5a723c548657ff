"""Benchmarks of functions, programs and jobs from Python, on Dragon."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rhapsody_mcp.api import AITask, ComputeTask, Session, TaskState
from rhapsody_mcp.backends import DragonExecutionBackendV3
from rhapsody_mcp.backends.engine_process import KeeperHandle
from rhapsody_mcp.bench.bare import BareWorkers, no_op
from rhapsody_mcp.bench.bare_dragon import Timing
from rhapsody_mcp.bench.measurement import Row
from rhapsody_mcp.engine.node.hardware import count_cores
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.engine.transport import Frames, frame
from rhapsody_mcp.model.errors import RhapsodyError

__all__ = ["compute_rows", "dragon_ready", "functions", "run"]

_RANKS = 4
_READY_S = 120.0
_LOOP = "a worker loop over a Unix socket"
_PROCESSES = "Dragon processes, all started before the first is waited for"


@asynccontextmanager
async def compute_rows(many: int, programs: int) -> AsyncIterator[list[Row]]:
    with BareWorkers(count_cores()) as bare:
        async with Session([await DragonExecutionBackendV3()]) as session, _bare_dragon() as dragon:
            yield [
                Row(
                    f"{many:,} functions that do nothing, from Python",
                    partial(functions, session, many),
                    partial(asyncio.to_thread, bare.run, many),
                    many,
                    "rate",
                    _LOOP,
                ),
                Row(
                    "one function, from Python",
                    partial(functions, session, 1),
                    partial(asyncio.to_thread, bare.run, 1),
                    bare=_LOOP,
                ),
                Row(
                    f"{programs} programs that do nothing",
                    partial(_programs, session, programs),
                    partial(dragon.measure, "processes", programs),
                    programs,
                    "rate",
                    _PROCESSES,
                ),
                Row(
                    f"{programs} programs with a process_template",
                    partial(_programs, session, programs, process_template={}),
                    partial(dragon.measure, "processes", programs),
                    programs,
                    "rate",
                    _PROCESSES,
                ),
                Row(
                    f"a job of {_RANKS} ranks",
                    partial(_programs, session, 1, process_templates=[(_RANKS, {})]),
                    partial(dragon.measure, "group", _RANKS),
                    bare="a Dragon process group",
                ),
            ]


async def functions(session: Session, count: int) -> float:
    return await run(session, [ComputeTask(no_op, args=(number,)) for number in range(count)])


async def _programs(session: Session, count: int, **kwargs: Any) -> float:
    return await run(
        session, [ComputeTask(executable="true", task_backend_specific_kwargs=kwargs) for _ in range(count)]
    )


async def run(session: Session, tasks: Sequence[ComputeTask | AITask]) -> float:
    """Run the tasks; the seconds from their submission until the last has ended."""
    began = time.perf_counter()
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks)
    took = time.perf_counter() - began
    if failed := [task for task in tasks if task.state is not TaskState.DONE]:
        raise RhapsodyError(f"a task of the benchmark did not end DONE: {failed[0].exception}")
    return took


# --- Dragon without anything of ours


class _BareDragon:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames: Frames[Timing] = Frames(Timing)

    async def measure(self, workload: str, count: int) -> float:
        """The seconds that the workload takes in the bare Dragon runtime."""
        self._writer.write(frame([(workload, count)]))
        while data := await self._reader.read(1 << 16):
            for took, problem in self._frames.feed(data):
                if problem:
                    raise RhapsodyError(f"Dragon itself, asked for {workload}: {problem}")
                return took
        raise RhapsodyError("Dragon ended under the benchmark.")


@asynccontextmanager
async def _bare_dragon() -> AsyncIterator[_BareDragon]:
    """A Dragon runtime that runs workloads without an engine of this package; entered when the runtime is ready."""
    folder, backend = RunDir(), DragonExecutionBackendV3()
    dragon: asyncio.Future[_BareDragon] = asyncio.get_running_loop().create_future()
    address = str(folder.path / "orders")
    server = await asyncio.start_unix_server(lambda *ends: dragon.set_result(_BareDragon(*ends)), address)
    keeper = KeeperHandle("bench", "dragon", folder.path, None)
    command = backend._host_command(Path(address))
    command[command.index("rhapsody_mcp.engine.host")] = "rhapsody_mcp.bench.bare_dragon"
    environment = backend._host_environment(folder.path, dict(os.environ))
    await keeper.start(["--name", "bench", "--log", str(folder.path / "log")], command, environment)
    try:
        async with asyncio.timeout(_READY_S):
            connection = await dragon
        yield connection
        connection._writer.close()
        await connection._writer.wait_closed()
    finally:
        server.close()
        keeper.stop_engine()
        await keeper.wait()
        folder.remove()


@asynccontextmanager
async def dragon_ready() -> AsyncIterator[list[Row]]:
    async def ours() -> float:
        began = time.perf_counter()
        async with Session([await DragonExecutionBackendV3()]):
            return time.perf_counter() - began

    async def limit() -> float:
        began = time.perf_counter()
        async with _bare_dragon():
            return time.perf_counter() - began

    yield [Row("Dragon ready", ours, limit, bare="dragon -s with a program of one line", warm_up=False)]
