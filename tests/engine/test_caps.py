"""What real engines keep of results and output that are too long, and what tasks find in their environment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.outcome import TaskFailed
from rhapsody_mcp.model.specs import Caps
from rhapsody_mcp.model.states import Cause, TaskState

pytestmark = pytest.mark.anyio

MB = 1024 * 1024
CAPS = Caps(result_bytes=4 * MB, output_bytes=2 * MB)
PROCESS: dict[str, Any] = {"process_template": {}}
MODULES = ["module() { export LOADED=$LOADED$2; PATH=/modules/$2:$PATH; }", "module load gcc", "module load mpi"]


@pytest.fixture(scope="module", params=[LocalExecutionBackend, DragonExecutionBackendV3], ids=["local", "dragon"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    os.environ["A_TOKEN"] = "secret"
    environment = {"variables": {"GIVEN": "yes"}, "setup": MODULES, "withheld": ["*TOKEN"]}
    try:
        async with Session([await request.param(num_workers=2, caps=CAPS, environment=environment)]) as session:
            yield session
    finally:
        del os.environ["A_TOKEN"]


async def run(session: Session, *tasks: ComputeTask) -> list[ComputeTask]:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)
    return list(tasks)


# --- the functions that tasks run; imports inside, because only the function travels


def flood(megabytes: int) -> int:
    import os

    os.write(1, b"first\n")
    for _ in range(megabytes):
        os.write(1, b"x" * 1024 * 1024)
    print("last")
    return megabytes


def flood_both() -> None:
    import sys

    for stream in (sys.stdout, sys.stderr):
        stream.write("y" * (3 * 1024 * 1024))


def say(text: str) -> str:
    print(text)
    return text


def make_bytes(count: int) -> bytes:
    return b"z" * count


def make_text(count: int) -> str:
    return "z" * count


def make_list(count: int) -> list[int]:
    return list(range(count))


def environment() -> dict[str, str | None]:
    import os

    names = ("GIVEN", "LOADED", "A_TOKEN", "PATH")
    return {name: os.environ.get(name) for name in names}


async def test_a_flood_of_1_gb_keeps_beginning_and_end_takes_little_disk_and_the_task_goes_on(session: Session) -> None:
    tasks = [
        ComputeTask(flood, args=[1024]),
        ComputeTask(flood, args=[1024], task_backend_specific_kwargs=PROCESS),
        ComputeTask(executable="/bin/sh", arguments=["-c", "echo first; head -c 1G /dev/zero | tr '\\0' x; echo last"]),
    ]
    for task in tasks:
        looking = asyncio.create_task(most_on_disk(session))
        await run(session, task)
        looking.cancel()
        assert task.state is TaskState.DONE and task.stdout is not None
        assert task.stdout.startswith("first\nxxx") and task.stdout.endswith("xlast\n")
        assert len(task.stdout) < 2 * MB + 100
        left_out = 1024 * MB + len("first\nlast\n") - 2 * MB
        assert f"[... {left_out} bytes left out here ...]" in task.stdout
        assert any(note.startswith(f"stdout was too long: {left_out} bytes") for note in task.notes)
        assert 0 < max(_seen) < 4 * MB, "its disk is freed while it runs"
    assert [task.return_value for task in tasks[:2]] == [1024, 1024]


_seen: list[int] = []


async def most_on_disk(session: Session) -> None:
    """What the files of the engine take, again and again."""
    _seen[:] = [0]
    (backend,) = session.backends
    folder: Path = backend._engine.folder.path  # type: ignore[attr-defined]  # nothing else knows where it prints
    while True:
        _seen.append(await asyncio.to_thread(disk_of_outputs, str(folder)))
        await asyncio.sleep(0.02)


def disk_of_outputs(folder: str) -> int:
    """Blocks of the files that keep what processes print."""
    taken = [0]
    for path in Path(folder).glob("*.out"):
        with suppress(FileNotFoundError):
            taken.append(path.stat().st_blocks * 512)
    return max(taken)


async def test_each_stream_has_its_own_limit_and_the_next_task_starts_empty(session: Session) -> None:
    long, *short = [ComputeTask(flood_both), *(ComputeTask(say, args=[f"task {number}"]) for number in range(4))]
    await run(session, long)
    await run(session, *short)
    assert [note.partition(" ")[0] for note in long.notes] == ["stdout", "stderr"]
    assert [(task.stdout, task.notes) for task in short] == [(f"task {number}\n", ()) for number in range(4)]


@pytest.mark.parametrize(
    ("function", "count"), [(make_bytes, 1024 * MB), (make_bytes, 4 * MB), (make_text, 5 * MB), (make_list, MB)]
)
@pytest.mark.parametrize("mode", [{}, PROCESS], ids=["native", "process"])
async def test_a_result_that_is_too_long_fails_its_task_and_says_what_to_do(
    session: Session, function: Any, count: int, mode: dict[str, Any]
) -> None:
    (task,) = await run(session, ComputeTask(function, args=[count], task_backend_specific_kwargs=mode))
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.ERROR)
    with pytest.raises(TaskFailed, match=r"takes more than 4,194,304 bytes \(max_result_bytes .* Write it into a file"):
        await task


async def test_a_result_within_the_limit_is_whole(session: Session) -> None:
    (task,) = await run(session, ComputeTask(make_bytes, args=[3 * MB]))
    assert task.return_value == b"z" * 3 * MB


async def test_every_kind_of_task_runs_with_the_environment_and_without_secrets(session: Session) -> None:
    script = 'echo "$GIVEN $LOADED ${A_TOKEN-unset} ${PATH%%:*}"'
    native, process, program, named = await run(
        session,
        ComputeTask(environment),
        ComputeTask(environment, task_backend_specific_kwargs=PROCESS),
        ComputeTask(executable="/bin/sh", arguments=["-c", script]),
        ComputeTask(executable="sh", arguments=["-c", "tr '\\0' '\\n' < /proc/$PPID/environ | grep -c A_TOKEN"]),
    )
    for task in (native, process):
        found = task.return_value
        assert (found["GIVEN"], found["LOADED"], found["A_TOKEN"]) == ("yes", "gccmpi", None)
        assert found["PATH"].startswith("/modules/mpi:/modules/gcc:")
    assert program.return_value == "yes gccmpi unset /modules/mpi"
    assert named.exit_code == 1 and named.stdout == "0\n", "nor do the processes above it have them"


async def test_a_setup_line_that_fails_fails_the_tasks_with_its_words() -> None:
    backend = LocalExecutionBackend(num_workers=1, environment={"setup": ["true", "module load nonsense"]})
    async with Session([backend]) as session:
        (task,) = await run(session, ComputeTask(say, args=["never"]))
        assert task.cause is Cause.INVALID
        assert task.outcome is not None and "'module load nonsense' ended with exit code 127" in task.outcome.error
