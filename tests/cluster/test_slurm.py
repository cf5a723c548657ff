"""Slurm, with the real commands, on a cluster of simulated nodes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.model.errors import InvalidRequest, SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus
from rhapsody_mcp.schedulers.detection import describe_scheduler
from rhapsody_mcp.schedulers.slurm import Slurm
from tests.cluster.cluster import Cluster
from tests.processes import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("cluster", [3], indirect=True)]

SLEEP = "#!/bin/sh\nexec sleep 300\n"


@pytest.fixture
async def slurm(cluster: Cluster) -> AsyncIterator[Slurm]:
    """All nodes are idle before and after each test."""
    yield Slurm(cluster.environment)
    cluster.run("scancel", "--user=root")
    await wait_until(lambda: not cluster.run("squeue", "-h"), 60)
    await wait_until(lambda: cluster.run("sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D") == "3\n", 60)


async def until(slurm: Slurm, job_id: str, reached: Callable[[JobStatus], bool]) -> JobStatus:
    """The status of the job as soon as `reached` is true of the status."""
    with anyio.fail_after(90):
        while not reached(status := (await slurm.status([job_id]))[job_id]):  # noqa: ASYNC110 - Slurm has no event to wait for
            await anyio.sleep(0.2)
    return status


def running(status: JobStatus) -> bool:
    return status.scheduler_state == "RUNNING"


def ended(status: JobStatus) -> bool:
    return status.state is JobState.ENDED


async def test_a_job_runs_the_script_once_on_all_its_nodes_and_ends_with_its_exit_code(
    cluster: Cluster, slurm: Slurm
) -> None:
    log = cluster.shared / "100%.log"
    log.write_text("before\n")
    script = "#!/bin/sh\npwd\necho ${SLURM_TIME_FORMAT-unset}\nsrun hostname | sort\nexit 3\n"
    request = AllocationRequest(nodes=2, minutes=5, job_name="mine")
    job_id = await slurm.submit(request, script, log)
    status = await until(slurm, job_id, ended)
    assert (status.scheduler_state, status.exit_code, status.reason) == ("FAILED", 3, "NonZeroExitCode")
    assert len(status.nodes) == 2
    assert log.read_text().splitlines() == ["before", str(cluster.shared), "unset", *status.nodes]
    assert await slurm.find_jobs("mine") == [job_id]
    assert status.submitted_at and status.started_at and status.ends_at
    assert status.submitted_at <= status.started_at <= status.ends_at


async def test_a_job_that_runs_has_a_time_limit_and_is_canceled(cluster: Cluster, slurm: Slurm) -> None:
    log = cluster.shared / "canceled.log"
    script = "#!/bin/sh\necho begun\nexec sleep 300\n"
    job_id = await slurm.submit(AllocationRequest(nodes=1, minutes=5), script, log)
    status = await until(slurm, job_id, running)
    await wait_until(lambda: log.exists() and log.read_text() == "begun\n", 90)
    assert status.ends_at and status.started_at
    assert status.ends_at - status.started_at == 300
    await slurm.cancel(job_id)
    status = await until(slurm, job_id, ended)
    assert (status.scheduler_state, status.exit_code) == ("CANCELLED", -signal.SIGTERM)
    await slurm.cancel(job_id)  # a second time changes nothing


async def test_a_job_can_ask_for_a_signal_and_further_options(cluster: Cluster, slurm: Slurm) -> None:
    request = AllocationRequest(nodes=1, minutes=5, signal_s=240, lines=("--requeue", "--comment=by us"))
    job_id = await slurm.submit(request, SLEEP, cluster.shared / "log")
    shown = cluster.run("scontrol", "show", "job", "-o", job_id)
    assert " Requeue=1 " in shown
    assert " Comment=by us " in shown
    assert "OverSubscribe=NO" in shown, "no other job on its nodes"


async def test_jobs_that_wait_say_why_and_until_when(cluster: Cluster, slurm: Slurm) -> None:
    log = cluster.shared / "log"
    all_nodes = AllocationRequest(nodes=3, minutes=5)
    first = await slurm.submit(all_nodes, SLEEP, log)
    await until(slurm, first, running)
    second = await slurm.submit(all_nodes, SLEEP, log)
    third = await slurm.submit(all_nodes, SLEEP, log)
    held = await slurm.submit(AllocationRequest(nodes=1, minutes=5, lines=("--hold",)), SLEEP, log)
    after = AllocationRequest(nodes=1, minutes=5, lines=(f"--dependency=afterok:{first}",))
    dependent = await slurm.submit(after, SLEEP, log)
    later = await slurm.submit(AllocationRequest(nodes=1, minutes=5, lines=("--begin=now+1hour",)), SLEEP, log)
    estimated = await until(slurm, second, lambda status: status.estimated_start is not None)
    await until(slurm, third, lambda status: status.reason == "Priority")
    statuses = await slurm.status([second, third, held, dependent, later, "99999"])
    reasons = ["Resources", "Priority", "JobHeldUser", "Dependency", "BeginTime", ""]
    assert [status.reason for status in statuses.values()] == reasons
    assert [status.state for status in statuses.values()] == [JobState.PENDING] * 5 + [JobState.UNKNOWN]
    assert all(status.explanation for status in statuses.values() if status.reason)
    running_until = (await slurm.status([first]))[first].ends_at
    assert estimated.estimated_start is not None and running_until is not None
    assert estimated.estimated_start >= running_until, "the first job keeps the nodes so long"
    cluster.run("scontrol", "release", held)
    await slurm.cancel(first)
    for job in (second, third, dependent):
        await slurm.cancel(job)
    await until(slurm, held, running)


async def test_a_check_submits_nothing_and_has_an_estimate(cluster: Cluster, slurm: Slurm) -> None:
    verdict = await slurm.check(AllocationRequest(nodes=2, minutes=5), SLEEP)
    assert verdict.accepted
    assert verdict.nodes == tuple(cluster.nodes[:2])
    assert verdict.starts_at is not None
    assert not cluster.run("squeue", "-h")
    verdict = await slurm.check(AllocationRequest(nodes=1, minutes=5, partition="nope"), SLEEP)
    assert not verdict.accepted
    assert "invalid partition specified: nope" in verdict.words


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (AllocationRequest(nodes=1, minutes=5, partition="nope"), "invalid partition specified: nope"),
        (AllocationRequest(nodes=9, minutes=5), "partition batch has 3 nodes, and 9 were asked for"),
        (AllocationRequest(nodes=1, minutes=500), "partition batch gives a job 60 minutes at most, not 500"),
        (AllocationRequest(nodes=1, minutes=5, gpus_per_node=1), "partition batch has nodes with 0 GPUs at most"),
        (AllocationRequest(nodes=1, minutes=5, constraint="nope"), "Invalid feature specification. `sinfo"),
        (AllocationRequest(nodes=1, minutes=5, reservation="nope"), "Requested reservation is invalid. `scontrol"),
        (AllocationRequest(nodes=1, minutes=5, lines=("--mem=99999",)), "Memory specification can not be satisfied"),
        (AllocationRequest(nodes=1, minutes=5, lines=("--bogus",)), "unrecognized option '--bogus'"),
    ],
)
async def test_a_refusal_has_slurms_words_and_what_is_valid(
    cluster: Cluster, slurm: Slurm, request_: AllocationRequest, words: str
) -> None:
    with pytest.raises(SchedulerRefusal) as caught:
        await slurm.submit(request_, SLEEP, cluster.shared / "log")
    assert words in str(caught.value)
    assert "batch with 3 nodes, 60 minutes at most; urgent with 3 nodes" in str(caught.value)
    assert not cluster.run("squeue", "-h")
    assert not (await slurm.check(request_, SLEEP)).accepted


async def test_what_is_no_script_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must begin with '#!'"):
        await slurm.submit(AllocationRequest(nodes=1, minutes=5), "sleep 1", tmp_path / "log")


async def test_the_description_has_the_partitions_with_what_is_free(cluster: Cluster, slurm: Slurm) -> None:
    job_id = await slurm.submit(AllocationRequest(nodes=2, minutes=5), SLEEP, cluster.shared / "log")
    await until(slurm, job_id, running)
    described = await describe_scheduler(cluster.environment, within_s=60)
    assert (described.name, described.problem, described.allocation) == ("slurm", "", None)
    assert described.version.startswith("slurm")
    batch, urgent = described.partitions
    assert (batch.name, batch.default, urgent.name, urgent.default) == ("batch", True, "urgent", False)
    assert (batch.state, batch.nodes, batch.idle, batch.cores, batch.memory_mb) == ("up", 3, 1, 2, 8000)
    assert (batch.gpus, batch.limit_minutes, batch.max_nodes) == (0, 60, None)


async def test_a_forgotten_job_is_found_in_the_log_of_ended_jobs(cluster: Cluster, slurm: Slurm) -> None:
    job_id = await slurm.submit(AllocationRequest(nodes=1, minutes=5), "#!/bin/sh\nexit 4\n", cluster.shared / "log")
    before = await until(slurm, job_id, ended)
    forgetful = Slurm({**cluster.environment, "PATH": f"{forgetting(cluster)}:{cluster.environment['PATH']}"})
    after = (await forgetful.status([job_id, "99999"]))[job_id]
    assert (after.scheduler_state, after.exit_code, after.nodes) == ("FAILED", 4, before.nodes)
    assert (after.started_at, after.ends_at) == (before.started_at, before.ends_at)


def forgetting(cluster: Cluster) -> Path:
    """A folder with a squeue that knows no job, as the real one after MinJobAge."""
    folder = cluster.shared / "forgetting"
    folder.mkdir()
    squeue = folder / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    squeue.chmod(0o755)
    return folder


async def test_a_job_goes_on_without_a_node_that_died_and_ends_where_none_is_left(
    cluster: Cluster, slurm: Slurm
) -> None:
    two = await slurm.submit(AllocationRequest(nodes=2, minutes=5), SLEEP, cluster.shared / "log")
    first, second = (await until(slurm, two, running)).nodes
    one = await slurm.submit(AllocationRequest(nodes=1, minutes=5), SLEEP, cluster.shared / "log")
    (third,) = (await until(slurm, one, running)).nodes
    try:
        cluster.kill(second)
        cluster.kill(third)
        status = await until(slurm, two, lambda status: status.nodes == (first,))
        assert status.state is JobState.RUNNING
        status = await until(slurm, one, ended)
        assert (status.scheduler_state, status.nodes) == ("NODE_FAIL", (third,))
    finally:
        cluster.start(second)
        cluster.start(third)


async def test_a_controller_that_is_down_is_no_end_of_a_job(cluster: Cluster, slurm: Slurm) -> None:
    request = AllocationRequest(nodes=1, minutes=5)
    job_id = await slurm.submit(request, SLEEP, cluster.shared / "log")
    await until(slurm, job_id, running)
    cluster.stop_controller()
    try:
        calls = [slurm.status([job_id]), slurm.submit(request, SLEEP, cluster.shared / "log"), slurm.cancel(job_id)]
        errors = await asyncio.gather(*calls, slurm.check(request, SLEEP), return_exceptions=True)
        assert [type(error) for error in errors] == [SchedulerUnavailable] * 4
        assert "Unable to contact slurm controller" in str(errors[0])
        described = await describe_scheduler(cluster.environment)
        assert not described.name
        assert "gave no answer within" in described.problem
    finally:
        cluster.start_controller()
    await wait_until(lambda: "UP" in cluster.run("sh", "-c", "scontrol ping || :"), 60)
    assert (await until(slurm, job_id, running)).state is JobState.RUNNING
