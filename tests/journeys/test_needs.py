"""Tasks get the cores and the memory that they ask for, no more, and what they used is told."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.engine.node.hardware import count_gpus
from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name

pytestmark = [pytest.mark.anyio, IN_ONE_ERA]

CORES, GPUS = len(os.sched_getaffinity(0)), count_gpus()
BOUND = """
def bound(item=0):
    import os, time
    time.sleep(0.5)
    return [sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS"), os.environ["RHAPSODY_RANK"]]
"""
ONE = {"source": BOUND}
EATER = """
def eat(mb, seconds, go):
    import os, time
    print("begins", flush=True)
    while not os.path.exists(go):
        time.sleep(0.05)
    held = b"x" * (mb * 1000_000)
    time.sleep(seconds)
    return len(held)
"""
EATS = "import sys, time; held = b'x' * (int(sys.argv[1]) * 1000_000); time.sleep(float(sys.argv[2]))"
CHILD_EATS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {EATS!r}, *sys.argv[1:]])"
STEADY = """
def steady(stop):
    import os, time
    while not os.path.exists(stop):
        time.sleep(0.05)
    return "steady"
"""
BUSY = """
def busy():
    import time
    held = b"x" * 150_000_000
    until = time.process_time() + 1
    while time.process_time() < until:
        pass
    return len(held)
"""
MEETS = """
import os, sys, time
folder, count = sys.argv[1], int(sys.argv[2])
open(os.path.join(folder, str(os.getpid())), "w").close()
for _ in range(1200):
    if len(os.listdir(folder)) == count:
        break
    time.sleep(0.05)
print(len(os.listdir(folder)))
"""


@pytest.fixture(params=["local", "dragon"])
async def opened(agent: Traveller, request: pytest.FixtureRequest) -> AsyncIterator[Traveller]:
    await agent.create(request.param)
    yield agent


def program(code: str, *arguments: object, **more: Any) -> dict[str, Any]:
    return {"executable": sys.executable, "arguments": ["-c", code, *map(str, arguments)], **more}


async def test_a_function_is_bound_to_the_cores_that_it_asks_for(opened: Traveller) -> None:
    await opened.submit({"name": "one", "source": BOUND, "cores": 1}, {"name": "all", "source": BOUND, "cores": CORES})
    rows = rows_by_name(await opened.wait())
    assert {name: (len(row["result"][0]), row["result"][1]) for name, row in rows.items()} == {
        "one": (1, "1"),
        "all": (CORES, str(CORES)),
    }


async def test_each_item_of_a_for_each_gets_its_cores(opened: Traveller) -> None:
    await opened.submit({"name": "each", "source": BOUND, "for_each": 2 * CORES, "cores": 1})
    assert (await opened.wait())["counts"] == {"DONE": 2 * CORES}
    value = (await opened.result("each"))["result"]
    assert [(len(cores), threads) for cores, threads, _ in value] == [(1, "1")] * 2 * CORES
    assert {core for cores, *_ in value for core in cores} == os.sched_getaffinity(0), "all cores are in use"


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
async def test_each_rank_of_a_job_has_cores_of_its_own(opened: Traveller) -> None:
    await opened.submit({"name": "job", "source": BOUND, "ranks": 2, "cores": 1})
    assert (await opened.wait())["counts"] == {"DONE": 1}
    first, second = [(await opened.result("job", rank=rank))["result"] for rank in range(2)]
    assert (first[1:], second[1:]) == (["1", "0"], ["1", "1"])
    assert len(first[0]) == len(second[0]) == 1 and first[0] != second[0]


@pytest.mark.parametrize(
    "task",
    [
        lambda seconds, go: {"source": EATER, "args": [400, seconds, go]},
        lambda seconds, go: program(EATS, 400, seconds),
        lambda seconds, go: program(CHILD_EATS, 400, seconds),
    ],
    ids=["function", "program", "child of a program"],
)
async def test_more_memory_than_asked_for_ends_that_task_alone(
    opened: Traveller, task: Callable[[int, str], dict[str, Any]], tmp_path: Path
) -> None:
    stop, go = tmp_path / "stop", tmp_path / "go"
    eats = task(600, str(go))
    await opened.submit(
        {"name": "steady", "source": STEADY, "args": [str(stop)]}, {"name": "eat", "memory_gb": 0.2, **eats}
    )
    if "source" in eats:
        assert (await opened.wait(until={"task": "eat", "text": "begins"}))["until"]["met"]
    await anyio.Path(go).touch()
    waited = await opened.wait(count=1)
    [failure] = waited["failures"]
    assert (failure["tasks"], failure["cause"]) == (["eat"], "memory")
    assert "was allowed 0.2 GB" in failure["error"] and "memory_gb" in failure["error"]
    result = await opened.result("eat")
    assert 0.2 <= result["peak_memory_gb"] < 1 and result["seconds"] > 0
    assert result["asked_for"] == "1 core and 0.2 GB of memory"
    used = (await opened.call("get_statistics", session=opened.session))["used"]
    assert (used["largest"], used["peak_memory_gb"]) == ("eat", result["peak_memory_gb"])
    if "source" in eats:
        assert result["stdout"] == "begins\n"
    assert 0 < result["cpu_seconds"] < 10
    await opened.submit({"name": "eat", "memory_gb": 2, **task(0, str(go))})
    assert (await opened.wait(tasks=["eat"]))["counts"] == {"DONE": 1}
    await anyio.Path(stop).touch()
    assert (await opened.wait(tasks=["steady"]))["counts"] == {"DONE": 1}


async def test_more_than_there_is_is_refused_with_what_there_is(opened: Traveller) -> None:
    refusal = await opened.refusal("submit_tasks", session=opened.session, tasks=[{**ONE, "cores": CORES + 1}])
    assert f"it needs {CORES + 1} cores, and this engine has " in refusal and f" with {CORES} cores" in refusal
    refusal = await opened.refusal("submit_tasks", session=opened.session, tasks=[{**ONE, "memory_gb": 100_000}])
    assert "100000 GB of memory, and this engine has " in refusal and "ask for less" in refusal
    refusal = await opened.refusal("submit_tasks", session=opened.session, tasks=[{**ONE, "cores": 1, "ranks": 999}])
    assert f"valid is up to {CORES} such ranks" in refusal
    if not GPUS:
        refusal = await opened.refusal("submit_tasks", session=opened.session, tasks=[{**ONE, "gpus": 1}])
        assert "1 GPU, and this engine has " in refusal


async def test_what_tasks_used_is_told_of_each_and_of_all(opened: Traveller) -> None:
    await opened.submit({"name": "own", "source": BUSY, "cores": 1}, {"name": "shared", "source": BUSY})
    assert (await opened.wait())["counts"] == {"DONE": 2}
    own, shared = await opened.result("own"), await opened.result("shared")
    assert 1 <= own["cpu_seconds"] < 10 and 0.15 < own["peak_memory_gb"] < 0.5
    assert 1 <= shared["cpu_seconds"] < 10 and "peak_memory_gb" not in shared
    used = (await opened.call("get_statistics", session=opened.session))["used"]
    assert used["cpu_seconds"] >= 2 and (used["largest"], used["peak_memory_gb"]) == ("own", own["peak_memory_gb"])


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
async def test_a_job_of_all_cores_is_not_starved_by_a_stream_of_short_functions(
    opened: Traveller, tmp_path: Path
) -> None:
    stop = str(tmp_path / "stop")
    await opened.submit(*({"name": f"first{number}", "source": STEADY, "args": [stop]} for number in range(CORES)))
    await opened.submit({"name": "job", **ONE, "cores": CORES})
    short = "def short(number=0):\n    import time\n    time.sleep(0.2)"
    await opened.submit({"name": "stream", "source": short, "for_each": 1000})
    assert (await opened.wait(tasks=["job"], timeout_s=2))["counts"] == {"QUEUED": 1}
    await anyio.Path(stop).touch()
    assert (await opened.wait(tasks=["job"]))["counts"] == {"DONE": 1}
    counts = (await opened.wait(timeout_s=0))["counts"]
    assert counts["QUEUED"] > 0, "the stream goes on behind it"


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
async def test_parts_of_cores_let_more_programs_run_at_a_time_than_there_are_cores(
    opened: Traveller, tmp_path: Path
) -> None:
    await opened.submit(*(program(MEETS, tmp_path, 6, name=f"part{number}", cores=0.25) for number in range(6)))
    rows = rows_by_name(await opened.wait())
    assert {row["result"] for row in rows.values()} == {"6"}
