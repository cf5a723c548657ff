"""What a row of the matrix complains of: each thing that must not be is made to be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.faults.grounds import nothing_special
from tests.faults.processes import command_of
from tests.faults.record import Record
from tests.faults.steps import Steps
from tests.faults.world import Client, World
from tests.processes import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.ci]

_UID = "task.000001"


class _Teller(Client):
    """Tells what it has been given to tell, in place of a service."""

    def __init__(self, world: World, value: Any) -> None:
        super().__init__(world)
        self.rows: list[dict[str, Any]] = []
        self.value = value
        self.tell("DONE")

    def tell(self, state: str, **more: str) -> None:
        self.rows = [{"task": _UID, "name": "once", "kind": "function", "state": state, **more}]

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        return {"tasks": self.rows, "has_more": False} if tool == "list_tasks" else {"result": self.value}


class _Told:
    """A record of one task, which ran once, is DONE, and has the right result."""

    def __init__(self, world: World) -> None:
        step = Steps(world.runs, world.gate).native("once")
        self.run: Path = world.runs / "once"
        self.run.write_text("1\n")
        self.teller = _Teller(world, list(step.value))
        self.record = Record(world, "session", self.teller)
        self.record.accept({"first": _UID}, step)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World(nothing_special, {}) as world:
        yield world


async def test_what_went_well_is_complained_of_nowhere(world: World) -> None:
    told = _Told(world)
    await told.record.look()
    assert await told.record.check({}, {}) == []
    assert await world.left(within_s=0) == []


_Mutation: TypeAlias = Callable[[_Told], object]

_MUTATIONS: dict[str, _Mutation] = {
    "once ran 2 times, with 0 retries": lambda told: told.run.write_text("1\n2\n"),
    "once is DONE and never ran": lambda told: told.run.unlink(),
    f"{_UID} was accepted and is not there any more": lambda told: told.teller.rows.clear(),
    f"{_UID} is there and was never accepted": lambda told: told.record.accepted.clear(),
    f"{_UID} once had ended as DONE and is FAILED lost": lambda told: told.teller.tell("FAILED", cause="lost"),
    f"{_UID} once had ended as DONE and is RUNNING": lambda told: told.teller.tell("RUNNING"),
    "once has a result that is not what it returned": lambda told: told.teller.value.append(0),
    "once has another result than before": lambda told: told.teller.value.append(0),
}


@pytest.mark.parametrize("complaint", _MUTATIONS)
async def test_a_change_after_the_end_was_told_is_complained_of(world: World, complaint: str) -> None:
    told = _Told(world)
    await told.record.look()
    await told.record.read()
    _MUTATIONS[complaint](told)
    assert [problem for problem in await told.record.check({}, {}) if problem.startswith(complaint)]


async def test_a_task_that_does_not_end_is_complained_of(world: World) -> None:
    told = _Told(world)
    told.teller.tell("RUNNING")
    assert await told.record.check({}, {}) == [f"{_UID} once was accepted and has not ended"]


async def test_an_end_that_is_not_the_true_one_is_complained_of(world: World) -> None:
    told = _Told(world)
    assert await told.record.check({"once": "lost"}, {}) == ["once is DONE, and should be lost"]
    lost = _Told(world)
    lost.teller.tell("FAILED", cause="lost")
    assert await lost.record.check({}, {}) == ["once is FAILED lost, and should be DONE"]


async def test_a_process_that_is_left_is_complained_of(world: World) -> None:
    left = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    await wait_until(lambda: command_of(left.pid) == ["sleep", "600"])  # it has none while it becomes the program
    assert await world.left(within_s=0) == [f"{left.pid} sleep 600"]
    left.kill()
    await left.wait()
    assert await world.left(within_s=0) == []


async def test_shared_memory_that_is_left_is_complained_of(world: World) -> None:
    file = Path("/dev/shm") / world.folder.name
    file.touch()
    assert await world.left(within_s=0) == [str(file)]
    file.unlink()
    assert await world.left(within_s=0) == []
