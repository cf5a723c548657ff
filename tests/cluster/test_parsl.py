"""Jobs through Parsl's provider for Slurm, on a real Slurm with simulated nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.backends.local import LocalExecutionBackend
from rhapsody_mcp.backends.pilot.allocation import Allocation
from rhapsody_mcp.backends.pilot.backend import PilotBackend
from rhapsody_mcp.backends.pilot.messages import PlannedBackend
from rhapsody_mcp.model.errors import SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus
from rhapsody_mcp.schedulers.parsl_kinds import ParslKind
from rhapsody_mcp.schedulers.parsl_providers import ParslScheduler
from tests.cluster.cluster import Cluster
from tests.processes import wait_until

pytestmark = pytest.mark.anyio

SLURM = ParslKind(
    name="slurm",
    title="Slurm by Parsl",
    provider="parsl.providers.slurm.slurm:SlurmProvider",
    prefix="#SBATCH ",
    version="sbatch --version",
    listing="squeue -h -t all -n {name} -o %i",
    listed=r"^(\d+)$",
    options={"job_name": "--job-name={job_name}", "partition": "--partition={partition}"},
    always=("--no-requeue", "--no-kill"),
)


@pytest.fixture
def scheduler(cluster: Cluster) -> ParslScheduler:
    cluster.wait_until_idle()
    return ParslScheduler(SLURM, cluster.environment)


@pytest.fixture
def log(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    folder: Path = cluster.shared / request.node.name
    folder.mkdir()
    return folder / "log"


async def until(scheduler: ParslScheduler, job: str, is_reached: Callable[[JobStatus], bool]) -> JobStatus:
    with anyio.fail_after(60):
        while not is_reached(status := (await scheduler.status([job]))[job]):  # noqa: ASYNC110
            await anyio.sleep(0.2)  # the scheduler has no event for it
    return status


def is_over(status: JobStatus) -> bool:
    return status.state in (JobState.ENDED, JobState.UNKNOWN)


async def test_a_job_on_two_nodes_runs_once_and_is_canceled(
    cluster: Cluster, scheduler: ParslScheduler, log: Path
) -> None:
    assert (await scheduler.version()).startswith("Slurm by Parsl 2")
    script = "#!/bin/bash -l\npwd\necho nodes $SLURM_JOB_NUM_NODES >&2\nexec sleep 600\n"
    request = AllocationRequest(nodes=2, minutes=5, job_name="rhapsody-two", partition="batch")
    job = await scheduler.submit(request, script, log)
    await wait_until(lambda: log.exists() and log.read_text() == f"{log.parent}\nnodes 2\n", 60)
    assert (await scheduler.status([job]))[job].state is JobState.RUNNING
    assert cluster.run("squeue", "-h", "-o", "%i %j %D %l %P").split() == [job, "rhapsody-two", "2", "5:00", "batch"]
    assert await scheduler.find_jobs("rhapsody-two") == [job]
    await scheduler.cancel(job)
    await until(scheduler, job, is_over)
    assert not list(log.parent.glob("scheduler/*.job"))
    await scheduler.cancel(job)
    assert (await scheduler.status(["99999"]))["99999"].state is JobState.UNKNOWN


async def test_a_refusal_has_slurms_words(scheduler: ParslScheduler, log: Path) -> None:
    with pytest.raises(SchedulerRefusal, match=r"[Ii]nvalid partition"):
        await scheduler.submit(AllocationRequest(nodes=1, minutes=5, partition="nope"), "#!/bin/sh\n", log)


async def test_a_controller_that_is_down_is_no_end_of_a_job(
    cluster: Cluster, scheduler: ParslScheduler, log: Path
) -> None:
    request = AllocationRequest(nodes=1, minutes=5, job_name="rhapsody-down")
    job = await scheduler.submit(request, "#!/bin/sh\nexec sleep 600\n", log)
    await until(scheduler, job, lambda status: status.state is JobState.RUNNING)
    cluster.stop_controller()
    try:
        for call in (scheduler.status([job]), scheduler.cancel(job), scheduler.find_jobs("rhapsody-down")):
            with pytest.raises(SchedulerUnavailable, match="Unable to contact slurm controller"):
                await call
    finally:
        cluster.start_controller()
    await wait_until(lambda: "UP" in cluster.run("sh", "-c", "scontrol ping || :"), 60)
    await until(scheduler, job, lambda status: status.state is JobState.RUNNING)
    await scheduler.cancel(job)


@pytest.fixture
async def session(cluster: Cluster, scheduler: ParslScheduler, log: Path) -> AsyncIterator[Session]:
    planned = [PlannedBackend("local", {"num_nodes": 2}, str(cluster.shared))]
    allocation = Allocation(AllocationRequest(nodes=2, minutes=10), scheduler, planned)
    checks = LocalExecutionBackend()
    checks.plan_nodes(2)
    async with Session([PilotBackend(checks, allocation)], folder=log.parent) as opened:
        yield opened


async def test_functions_and_programs_run_through_a_pilot(cluster: Cluster, session: Session) -> None:
    functions = [ComputeTask(function=host_of, args=(number,)) for number in range(8)]
    ranks = {"process_templates": [(4, {})], "ranks_per_node": 2}
    program = ComputeTask(executable="/bin/hostname", task_backend_specific_kwargs=ranks)
    with anyio.fail_after(180):
        await session.submit_tasks([*functions, program])
        await session.wait_tasks([*functions, program])
    assert [task.return_value[0] for task in functions] == list(range(8))
    assert {task.return_value[1] for task in functions} <= set(cluster.nodes)
    assert program.state == "DONE" and set(program.nodes) == set(cluster.nodes)
    assert len(cluster.run("squeue", "-h", "-o", "%i").split()) == 1


def host_of(number: int) -> list[object]:
    import socket
    import time

    time.sleep(0.5)
    return [number, socket.gethostname()]
