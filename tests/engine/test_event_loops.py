"""Sessions in event loops of other kinds, and in more than one."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.errors import InvalidRequest

Backend = type[DragonExecutionBackendV3] | type[LocalExecutionBackend]


@pytest.mark.parametrize("backend", [DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
def test_a_session_runs_in_uvloop(backend: Backend) -> None:
    async def main() -> list[object]:
        async with Session([backend(num_workers=2)]) as session:
            tasks = [ComputeTask(abs, args=(-number,)) for number in range(100)]
            tasks.append(ComputeTask(executable="echo", arguments=["found"]))
            await session.submit_tasks(tasks)
            await session.wait_tasks(tasks, timeout=60)
            return [task.return_value for task in tasks]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == [*range(100), "found"]


def test_a_session_is_refused_in_a_second_event_loop() -> None:
    session = Session([LocalExecutionBackend(num_workers=1)])

    async def step(number: int) -> object:
        task = ComputeTask(abs, args=(number,))
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=60)
        return task.return_value

    async def last_step() -> object:
        result = await step(2)
        await session.close()
        return result

    with asyncio.Runner() as first, asyncio.Runner() as second:
        assert first.run(step(1)) == 1
        with pytest.raises(InvalidRequest, match=r"inside one asyncio\.run"):
            second.run(step(2))
        assert first.run(last_step()) == 2
