"""What becomes of tasks when a process of their engine is killed, and of an engine that nothing needs."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.states import Cause
from tests.engine.scene import ON_ALL_CORES, Scene, kill, write_line
from tests.processes import FAMILY, family, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", autouse=True)
def own_family() -> Iterator[None]:
    """So that only processes of this module are looked at, and killed."""
    before = os.environ[FAMILY]
    os.environ[FAMILY] = uuid.uuid4().hex
    yield
    os.environ[FAMILY] = before


@pytest.fixture(scope="module", params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with Session([await request.param(num_workers=1)]) as session:
        yield session
    assert not family("rhapsody_mcp.engine")


def sleep_the_first_time(path: str) -> str:
    import os
    import time

    if os.path.exists(path):
        return "the second time"
    open(path, "w").close()
    time.sleep(300)
    return "the first time"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
@pytest.mark.parametrize("victim", ["worker", "supervisor", "fork server", "host", "launcher", "keeper"])
async def test_what_ran_fails_and_what_waited_runs_whichever_process_is_killed(
    session: Session, victim: str, number: signal.Signals, tmp_path: Path
) -> None:
    if victim == "launcher" and isinstance(session.backends[0], LocalExecutionBackend):
        pytest.skip("only Dragon has a launcher")
    scene = Scene(session, tmp_path, {})
    await scene.begin()
    kill(scene.find(victim), number)
    await scene.end()
    cause = Cause.CRASHED if victim in ("worker", "supervisor") else Cause.LOST
    assert (scene.running.state, scene.running.cause) == (TaskState.FAILED, cause)


async def test_a_process_of_its_own_is_lost_with_its_engine_and_those_behind_it_run(
    session: Session, tmp_path: Path
) -> None:
    scene = Scene(session, tmp_path, ON_ALL_CORES)
    await scene.begin()
    kill(scene.find("host"), signal.SIGKILL)
    await scene.end()
    assert (scene.running.state, scene.running.cause) == (TaskState.FAILED, Cause.LOST)
    assert "lost its engine" in session.notices[-2].text
    assert "runs again, at attempt 1 of 5" in session.notices[-1].text


async def test_a_task_with_retries_runs_again_on_the_next_engine(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "began"
    task = ComputeTask(sleep_the_first_time, args=(str(path),), retries=1, retry_delay_s=0.0)
    await session.submit_tasks([task])
    await wait_until(path.exists)
    kill(set(family("rhapsody_mcp.engine.keeper")), signal.SIGKILL)
    await session.wait_tasks([task], timeout=600)
    assert (task.return_value, task.attempts) == ("the second time", 2)


# --- resting


@pytest.mark.parametrize("kind", [DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def test_an_engine_without_tasks_is_stopped_and_started_again_on_need(kind: type[Any], tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    async with Session([kind(num_workers=1, name=mark)], engine_idle_s=0.1) as session:
        for number in range(2):
            task = ComputeTask(write_line, args=(str(tmp_path / f"{number}"),))
            await session.submit_tasks([task])
            await task
            assert family(mark)
            await wait_until(lambda: not family(mark))
            assert session.engines == {mark: "at rest; the next task starts it"}
    assert sum("had no task for 0.1 s" in notice.text for notice in session.notices) == 2
