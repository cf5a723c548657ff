"""What becomes of tasks when a process of their engine is stopped (SIGSTOP), and nobody lets it go on."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.states import Cause
from tests.engine.scene import PROCESS, Scene, kill, sleep_with_a_child
from tests.processes import FAMILY, family, wait_until

pytestmark = pytest.mark.anyio

STALL_S = 6.0


@pytest.fixture(scope="module", autouse=True)
def own_family() -> Iterator[None]:
    """So that only processes of this module are looked at, and killed."""
    before = os.environ[FAMILY]
    os.environ[FAMILY] = uuid.uuid4().hex
    yield
    os.environ[FAMILY] = before


@pytest.fixture(scope="module")
async def session() -> AsyncIterator[Session]:
    async with Session([await LocalExecutionBackend(num_workers=1, stall_s=STALL_S)]) as session:
        yield session
    assert not family("rhapsody_mcp.engine")


@pytest.mark.parametrize(
    ("victim", "kwargs"),
    [("worker", {}), ("supervisor", {}), ("supervisor", PROCESS)],
    ids=["worker", "its supervisor", "the supervisor of a process"],
)
async def test_a_process_that_is_stopped_for_too_long_is_ended_and_its_task_fails(
    session: Session, victim: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    scene = Scene(session, tmp_path, kwargs)
    await scene.begin()
    kill(scene.find(victim), signal.SIGSTOP)
    await scene.end()
    assert (scene.running.state, scene.running.cause) == (TaskState.FAILED, Cause.CRASHED)
    assert "was stopped (as by SIGSTOP) for 6 s" in str(scene.running.exception)


@pytest.mark.parametrize("victim", ["fork server", "host", "keeper"])
async def test_an_engine_that_stands_still_counts_as_dead(session: Session, victim: str, tmp_path: Path) -> None:
    scene = Scene(session, tmp_path, {})
    await scene.begin()
    kill(scene.find(victim), signal.SIGSTOP)
    await scene.end()
    assert (scene.running.state, scene.running.cause) == (TaskState.FAILED, Cause.LOST)


async def test_a_program_of_the_users_may_be_stopped_for_as_long_as_they_like(session: Session, tmp_path: Path) -> None:
    scene = Scene(session, tmp_path, PROCESS)
    await scene.begin()
    program = scene.find("worker")
    kill(program, signal.SIGSTOP)
    other = ComputeTask(sleep_with_a_child, args=(str(tmp_path / "other"),))
    await session.submit_tasks([other])
    await wait_until((tmp_path / "other").exists)
    kill({int((tmp_path / "other").read_text())}, signal.SIGSTOP)
    await session.wait_tasks([other], timeout=600)  # it was stopped later, and its time is over
    assert (other.cause, scene.running.state) == (Cause.CRASHED, TaskState.RUNNING)
    await session.cancel([scene.running])
    await scene.end()
