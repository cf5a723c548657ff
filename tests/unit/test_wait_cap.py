"""The cap of wait_tasks is on the whole call, whatever holds it up."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.testing import ScriptedBackend
from rhapsody_mcp.toolsets.waiting.wait import wait_for

pytestmark = pytest.mark.anyio


class Open:
    """Stands for the selection of a task that does not end."""

    def __init__(self, task: Task) -> None:
        self.until, self.open_session = [task], None


class Silent:
    """A signal that never comes."""

    async def wait(self, _: object) -> None:
        await anyio.sleep_forever()


async def open_task(session: Session, backend: ScriptedBackend) -> Task:
    backend.may_finish.clear()
    task = ComputeTask(abs, args=(1,))
    await session.submit_tasks([task])
    return task


async def wait(task: Task, timeout_s: float, started: float) -> list[float]:
    told: list[float] = []

    async def never_read(waited_s: float) -> None:
        told.append(waited_s)
        await anyio.sleep_forever()

    with anyio.fail_after(600):
        selected, signal = Open(task), Silent()
        await wait_for(
            selected,  # type: ignore[arg-type]
            signal,  # type: ignore[arg-type]
            count=None,
            since=0,
            timeout_s=timeout_s,
            started=started,
            tick=never_read,
        )
    return told


async def test_a_client_that_reads_no_progress_gets_its_reply_in_time() -> None:
    backend = ScriptedBackend(lambda *_: None)
    async with Session([backend]) as session:
        task = await open_task(session, backend)
        assert len(await wait(task, 0.05, asyncio.get_running_loop().time())) == 1


async def test_the_time_of_a_wait_counts_from_the_arrival_of_its_call() -> None:
    backend = ScriptedBackend(lambda *_: None)
    async with Session([backend]) as session:
        task = await open_task(session, backend)
        assert await wait(task, 3600, asyncio.get_running_loop().time() - 3600) == []
