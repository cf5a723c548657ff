"""The cap of wait_tasks is on the whole call, whatever holds it up."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.testing import ScriptedBackend
from rhapsody_mcp.toolsets.waiting.wait import wait_for

pytestmark = pytest.mark.anyio


class Open:
    """Stands for the selection of a task that does not end."""

    def __init__(self, task: Task) -> None:
        self.until, self.open_session, self.counted_from = [task], None, 0


class Silent:
    """A signal that never comes."""

    async def wait(self, _: object) -> None:
        await anyio.sleep_forever()


async def open_task(session: Session, backend: ScriptedBackend) -> Task:
    backend.may_finish.clear()
    task = ComputeTask(abs, args=(1,))
    await session.submit_tasks([task])
    return task


class AtOnce:
    """A signal that comes again and again, as where many tasks end."""

    async def wait(self, _: object) -> None:
        await anyio.lowlevel.checkpoint()


class NotYet:
    """A condition that counts the looks, each of which takes so long."""

    has_ended = False

    def __init__(self, look_s: float) -> None:
        self.look_s, self.looks = look_s, 0

    async def answer(self) -> None:
        self.looks += 1
        await anyio.sleep(self.look_s)


async def wait(task: Task, timeout_s: float, started: float, signal: object, condition: object = None) -> list[float]:
    """The ticks of a wait: their reader reads none, except beside a condition."""
    told: list[float] = []

    async def tick(waited_s: float) -> None:
        told.append(waited_s)
        if condition is None:
            await anyio.sleep_forever()

    with anyio.fail_after(600):
        selected = Open(task)
        await wait_for(
            selected,  # type: ignore[arg-type]
            signal,  # type: ignore[arg-type]
            count=None,
            timeout_s=timeout_s,
            started=started,
            tick=tick,
            condition=condition,  # type: ignore[arg-type]
        )
    return told


async def test_a_client_that_reads_no_progress_gets_its_reply_in_time() -> None:
    backend = ScriptedBackend(lambda *_: None)
    async with Session([backend]) as session:
        task = await open_task(session, backend)
        assert len(await wait(task, 0.05, asyncio.get_running_loop().time(), Silent())) == 1


async def test_the_time_of_a_wait_counts_from_the_arrival_of_its_call() -> None:
    backend = ScriptedBackend(lambda *_: None)
    async with Session([backend]) as session:
        task = await open_task(session, backend)
        assert await wait(task, 3600, asyncio.get_running_loop().time() - 3600, Silent()) == []


async def test_a_condition_is_looked_at_a_few_times_a_second_however_many_tasks_end() -> None:
    backend = ScriptedBackend(lambda *_: None)
    async with Session([backend]) as session:
        task, condition = await open_task(session, backend), NotYet(0)
        await wait(task, 0.8, asyncio.get_running_loop().time() - 0.3, AtOnce(), condition)
        assert 1 <= condition.looks <= 4


async def test_a_look_at_a_condition_ends_with_the_wait() -> None:
    backend = ScriptedBackend(lambda *_: None)
    async with Session([backend]) as session:
        task, condition = await open_task(session, backend), NotYet(3600)
        started = asyncio.get_running_loop().time()
        await wait(task, 0.05, started, Silent(), condition)
        assert condition.looks == 1 and asyncio.get_running_loop().time() - started < 1
