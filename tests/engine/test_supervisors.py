"""A supervisor whose program has ended well takes the next one, which finds nothing of the one before."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from tests.processes import family, wait_until

pytestmark = pytest.mark.anyio

POLITE = "trap 'exit 5' TERM; touch {}; while :; do sleep 0.05; done"


@pytest.fixture(scope="module", params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with Session([await request.param(num_workers=1)]) as session:
        yield session


async def shell(session: Session, script: str, **kwargs: Any) -> ComputeTask:
    task = ComputeTask(executable="sh", arguments=["-c", script], task_backend_specific_kwargs=kwargs)
    await session.submit_tasks([task])
    await session.wait_tasks([task], timeout=600)
    return task


async def supervisor(session: Session) -> int:
    """That of a program that has ended."""
    return int((await shell(session, "echo $PPID")).return_value)


async def files_of_supervisor(session: Session) -> int:
    """It may be one more than stay, while the supervisor says that the program has started."""
    return int((await shell(session, "ls -A /proc/$PPID/fd | wc -l")).return_value)


async def test_one_after_the_other_runs_under_the_same_and_finds_nothing_of_the_one_before(
    session: Session, tmp_path: Path
) -> None:
    first = await supervisor(session)
    noisy = await shell(session, "echo out; echo err >&2; setsid sleep 300 & sleep 0.1")
    assert (noisy.stdout, noisy.stderr, len(noisy.notes)) == ("out\n", "err\n", 1)
    assert not family("sleep", "300")
    quiet = await shell(session, "pwd")
    assert (quiet.return_value, quiet.stderr, quiet.notes) == (os.getcwd(), "", ())
    open_files = [await files_of_supervisor(session) for _ in range(6)]
    assert min(open_files[3:]) <= min(open_files[:3]), "no file stays open"
    assert await supervisor(session) == first


async def test_what_fails_or_cannot_start_leaves_the_next_one_alone(session: Session) -> None:
    failed = await shell(session, "exit 3")
    missing = ComputeTask(executable="no-such-program")
    script = ComputeTask(executable="/etc/hostname")
    await session.submit_tasks([missing, script])
    await session.wait_tasks([missing, script], timeout=600)
    assert (failed.exit_code, missing.cause, script.cause) == (3, "invalid", "invalid")
    assert (await shell(session, "kill -9 $$")).exit_code == -signal.SIGKILL
    assert (await shell(session, "echo well")).return_value == "well"


async def test_the_next_one_is_asked_to_end_as_the_first_was(session: Session, tmp_path: Path) -> None:
    await supervisor(session)
    for name in ("first", "second"):
        polite = ComputeTask(executable="sh", arguments=["-c", POLITE.format(tmp_path / name)])
        await session.submit_tasks([polite])
        await wait_until((tmp_path / name).exists)
        await session.cancel(polite)
        assert (polite.state, polite.exit_code) == (TaskState.CANCELED, 5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
async def test_one_that_was_killed_or_stopped_while_it_had_nothing_to_do_is_no_harm(
    session: Session, number: int
) -> None:
    os.kill(await supervisor(session), number)
    assert (await shell(session, "echo well")).return_value == "well"


async def test_the_cpus_of_one_are_not_those_of_the_next(session: Session) -> None:
    before = (await shell(session, "nproc")).return_value
    bound = await shell(session, "nproc", process_template={"policy": {"cpu_affinity": [min(os.sched_getaffinity(0))]}})
    assert bound.return_value == "1"
    assert (await shell(session, "nproc")).return_value == before


def leave_a_daemon() -> None:
    import subprocess

    subprocess.run(["sh", "-c", "setsid sleep 300 &"], check=True)


async def test_what_a_function_left_ends_with_it_whatever_its_parent_is(session: Session) -> None:
    task = ComputeTask(leave_a_daemon)
    await session.submit_tasks([task])
    await session.wait_tasks([task], timeout=600)
    assert task.state is TaskState.DONE
    assert not family("sleep", "300")
