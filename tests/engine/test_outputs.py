"""What real engines make of the JSON and the files of tasks, in each way of running a task."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, Part, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.specs import Caps
from rhapsody_mcp.model.states import Cause, TaskState

pytestmark = pytest.mark.anyio

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "process": {"process_template": {}},
    "job": {"process_templates": [(2, {})]},
}


@pytest.fixture(scope="module", params=[LocalExecutionBackend, DragonExecutionBackendV3], ids=["local", "dragon"])
async def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("work"))
        async with Session([await request.param(num_workers=2, caps=Caps(result_bytes=1_000_000))]) as session:
            yield session


async def run(session: Session, *tasks: ComputeTask | ForEach) -> None:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)


def write(name: str, size: int) -> str:
    """Rank 0 of a job writes the file that all ranks give out."""
    import os

    if os.environ.get("RHAPSODY_RANK", "0") == "0":
        with open(name, "w") as file:
            file.write("x" * size)
    return os.path.basename(os.getcwd())


def length(path: str) -> int:
    with open(path) as file:
        return len(file.read())


def lengths(runs: list[dict[str, Any]]) -> list[int]:
    sizes: list[int] = []
    for run in runs:
        with open(run["files"][f"sweep-{len(sizes) + 1}.txt"]) as file:
            sizes.append(len(file.read()))
    return sizes


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_files_are_collected_and_handed_on(session: Session, layout: str) -> None:
    name = f"{layout}.txt"
    made = ComputeTask(write, args=(name, 500_000), outputs=[name], task_backend_specific_kwargs=LAYOUTS[layout])
    script = f"echo '{{\"n\": [1, 2]}}' | tee {layout}.json"
    program = ComputeTask(
        executable="sh",
        arguments=["-c", script],
        stdout="json",
        outputs=["*.json"],
        task_backend_specific_kwargs=LAYOUTS[layout],
    )
    read = ComputeTask(length, args=(Part(made, f"/files/{name}"),))
    into = ComputeTask(sum, args=(Part(program, f"/files/{layout}.json/n"),))
    count = ComputeTask(executable="wc", arguments=["-c", Part(made, f"/files/{name}")])
    await run(session, made, program, read, into, count)
    assert made.return_value["result"].startswith("work")
    assert (read.return_value, into.return_value, count.return_value.split()[0]) == (500_000, 3, "500000")
    assert program.return_value["result"] == {"n": [1, 2]} and f"{layout}.json" in program.return_value["files"]


async def test_the_working_directory_is_that_of_the_task(session: Session, tmp_path: Path) -> None:
    template = {"process_template": {"cwd": str(tmp_path)}}
    made = ComputeTask(write, args=("here.txt", 3), outputs=["here.txt"], task_backend_specific_kwargs=template)
    await run(session, made)
    assert length(made.return_value["files"]["here.txt"]) == 3 == length(str(tmp_path / "here.txt"))


async def test_a_sweep_gives_all_its_files_to_one_task(session: Session) -> None:
    sweep = ForEach([1, 2, 3], lambda n, _: ComputeTask(write, args=(f"sweep-{n}.txt", n), outputs=[f"sweep-{n}.txt"]))
    total = ComputeTask(lengths, args=(sweep,))
    await run(session, sweep, total)
    assert total.return_value == [1, 2, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_missing_and_large_files_fail_the_task(session: Session, layout: str) -> None:
    large, missing = (
        ComputeTask(write, args=(f"{size}.bin", size), outputs=[name], task_backend_specific_kwargs=LAYOUTS[layout])
        for size, name in ((1_000_001, "1000001.bin"), (1, "2.bin"))
    )
    await run(session, large, missing)
    assert all(task.state is TaskState.FAILED and task.cause is Cause.ERROR for task in (large, missing))
    assert large.outcome and "1,000,000 is the most (max_result_bytes" in large.outcome.error
    assert missing.outcome and "matches '2.bin'" in missing.outcome.error and "1.bin" in missing.outcome.error


ODD_NAME = "touch \"$(printf 'r\\351sum.odd')\""


def leave_odd_name() -> None:
    from pathlib import Path

    Path("r\udce9sum.odd").touch()


async def test_a_name_that_is_no_text_fails_its_task_alone(session: Session, tmp_path: Path) -> None:
    template = {"process_template": {"cwd": str(tmp_path)}}
    kept, missed = (
        ComputeTask(executable="sh", arguments=["-c", ODD_NAME], outputs=[name], task_backend_specific_kwargs=template)
        for name in ("*.odd", "*.even")
    )
    function = ComputeTask(leave_odd_name, outputs=["*.odd"])
    await run(session, kept, missed, function)
    for task in (kept, function):
        assert task.cause is Cause.ERROR and task.outcome and r"'r\\udce9sum.odd' is no text" in task.outcome.error
    assert missed.cause is Cause.ERROR and missed.outcome and r"newest first: r\udce9sum.odd" in missed.outcome.error


def leave_no_result() -> None:
    import os
    import sys

    with open(f"{sys.argv[-1].removesuffix('.config')}.result", "w") as file:
        file.write("junk")
    os._exit(0)


@pytest.mark.parametrize("layout", ["process", "job"])
async def test_a_task_ends_and_gives_back_its_cores_whatever_it_leaves(session: Session, layout: str) -> None:
    all_cores = {**LAYOUTS[layout], "cores": len(os.sched_getaffinity(0)) // (2 if layout == "job" else 1)}
    broken, good = (
        ComputeTask(function, task_backend_specific_kwargs=all_cores) for function in (leave_no_result, os.getpid)
    )
    await run(session, broken, good)
    assert broken.cause is Cause.ERROR and broken.outcome and "DecodeError" in broken.outcome.error
    assert good.state is TaskState.DONE


async def test_json_is_asked_of_rank_0_alone(session: Session) -> None:
    script = '[ "$RHAPSODY_RANK" = 0 ] && echo "[0]" || echo "no JSON"'
    job = ComputeTask(
        executable="sh", arguments=["-c", script], stdout="json", task_backend_specific_kwargs=LAYOUTS["job"]
    )
    await run(session, job)
    assert job.return_value == [0] and [rank.return_value for rank in job.ranks] == [[0], "no JSON"]
