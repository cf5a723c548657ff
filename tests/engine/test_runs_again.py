"""Tasks that are canceled and run again while workers decide about what came before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Condition, ForEach, Session, TaskState
from rhapsody_mcp.backends import LocalExecutionBackend
from tests.processes import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with Session([await LocalExecutionBackend(num_workers=1)]) as session:
        yield session


# --- the functions that tasks run; imports inside, because only the function travels


def some_object() -> Any:
    return {1, 2, 3}  # no JSON: only a worker reads it


def block(began: str, stop: str) -> None:
    import os
    import time

    open(began, "w").close()
    while not os.path.exists(stop):
        time.sleep(0.01)


def write_line(path: str) -> None:
    with open(path, "a") as file:
        file.write("ran\n")


def object_or_failure(number: int, mended: str) -> Any:
    import os

    if number == 1 and not os.path.exists(mended):
        raise ValueError("not mended yet")
    return {number}


class Blocked:
    """The only worker of the session runs a function until `release`."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.began, self.stop = session, folder / "began", folder / "stop"

    async def begin(self) -> None:
        self.blocking = ComputeTask(block, args=(str(self.began), str(self.stop)))
        await self.session.submit_tasks([self.blocking])
        await wait_until(self.began.exists)

    def release(self) -> None:
        self.stop.touch()


async def test_a_task_that_was_canceled_while_its_condition_was_undecided_runs_once(
    session: Session, tmp_path: Path
) -> None:
    source, blocked, path = ComputeTask(some_object), Blocked(session, tmp_path), tmp_path / "lines"
    await session.submit_tasks([source])
    await source
    await blocked.begin()
    task = ComputeTask(write_line, args=(str(path),), when=Condition(source, exists=True))
    await session.submit_tasks([task])
    await session.cancel([task])
    assert await session.retry([task]) == [task]
    blocked.release()
    await task
    after = ComputeTask(write_line, args=(str(path),))  # by the same worker
    await session.submit_tasks([after])
    await after
    assert (task.attempts, path.read_text()) == (2, "ran\nran\n")


async def test_a_sweep_that_was_canceled_while_its_list_was_made_ends_with_the_tasks_that_run_again(
    session: Session, tmp_path: Path
) -> None:
    blocked, mended = Blocked(session, tmp_path), tmp_path / "mended"
    await blocked.begin()
    own_process: dict[str, object] = {"process_template": {}}  # so that only the list waits for the worker
    sweep = ForEach(
        [0, 1, 2],
        lambda number, _: ComputeTask(
            object_or_failure, args=(number, str(mended)), task_backend_specific_kwargs=own_process
        ),
    )
    length = ComputeTask(len, args=(sweep,))
    await session.submit_tasks([sweep, length])
    await session.wait_tasks(sweep.children, timeout=60)
    await session.cancel([sweep])
    states = [task.state for task in (*sweep.children, sweep, length)]
    assert states == [*"DONE FAILED DONE CANCELED CANCELED".split()]
    mended.touch()
    await session.retry([sweep])
    blocked.release()
    await session.wait_tasks([sweep, length], timeout=60)
    assert (sweep.state, sweep.return_value) == (TaskState.DONE, [{0}, {1}, {2}])
    assert (await length).return_value == 3
