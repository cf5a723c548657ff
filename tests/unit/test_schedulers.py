"""What Slurm's commands print, recorded from Slurm 22.05, as values; and allocations by their variables."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.model.errors import InvalidRequest, SchedulerUnavailable
from rhapsody_mcp.schedulers.allocation import Allocation, current_allocation
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus, Partition, Verdict
from rhapsody_mcp.schedulers.detection import NO_SCHEDULER, describe_scheduler, find_scheduler
from rhapsody_mcp.schedulers.hostlist import expand_hostlist, expand_repeats
from rhapsody_mcp.schedulers.slurm import Slurm
from rhapsody_mcp.schedulers.slurm_output import (
    is_outage,
    read_accounting,
    read_partitions,
    read_queue,
    read_verdict,
    scheduler_words,
)
from tests.processes import wait_until

QUEUE = """\
10|CANCELLED||1795896426|1795896514|1795896514|0|PartitionTimeLimit|
11|CANCELLED|c3node1|1795896426|1795896427|1795896514|15|None|
17|FAILED|c3node2|1795896515|1795896515|1795896517|768|NonZeroExitCode|
18|FAILED|c3node2|1795896515|1795896515|1795896517|9|JobLaunchFailure|
20|PENDING||1795896518|1795896817|1795897117|0|Resources|
23|PENDING||1795896520|N/A|N/A|0|Dependency|
31|PENDING||1795896520|N/A|N/A|0|ReqNodeNotAvail, UnavailableNodes:c3node[1-2]|
32|PENDING||1795896520|N/A|N/A|0|AssocGrpCPULimit|
19|RUNNING|c3node[1-2]|1795896517|1795896517|1795896817|0|None|
33|COMPLETING|c3node1|1795896517|1795896517|1795896817|0|None|
"""
"""Jobs 31 and 32 are written from Slurm's manual."""


# --- what Slurm prints


def test_a_queue_is_read() -> None:
    jobs = read_queue(QUEUE)
    assert list(jobs) == ["10", "11", "17", "18", "20", "23", "31", "32", "19", "33"]
    assert jobs["17"] == JobStatus(
        state=JobState.ENDED,
        scheduler_state="FAILED",
        reason="NonZeroExitCode",
        explanation="the job script failed",
        nodes=("c3node2",),
        submitted_at=1795896515,
        started_at=1795896515,
        ends_at=1795896517,
        exit_code=3,
    )
    assert (jobs["11"].exit_code, jobs["18"].exit_code) == (-signal.SIGTERM, -signal.SIGKILL)
    assert jobs["19"] == JobStatus(
        state=JobState.RUNNING,
        scheduler_state="RUNNING",
        nodes=("c3node1", "c3node2"),
        submitted_at=1795896517,
        started_at=1795896517,
        ends_at=1795896817,
    )
    assert jobs["20"] == JobStatus(
        state=JobState.PENDING,
        scheduler_state="PENDING",
        reason="Resources",
        explanation="waits until enough nodes are free",
        submitted_at=1795896518,
        estimated_start=1795896817,
    )
    assert (jobs["23"].estimated_start, jobs["33"].state) == (None, JobState.RUNNING)


def test_reasons_with_details_are_explained() -> None:
    jobs = read_queue(QUEUE)
    assert jobs["31"].reason == "ReqNodeNotAvail, UnavailableNodes:c3node[1-2]"
    assert jobs["31"].explanation == "nodes that the job needs are down, or reserved for maintenance"
    assert jobs["32"].explanation.startswith("the account is at a limit of its own (AssocGrpCPULimit)")


def test_a_state_that_is_new_is_unknown_and_not_failed() -> None:
    (job,) = read_queue("1|EXPEDITING||1|2|3|0|None|\n").values()
    assert (job.state, job.scheduler_state) == (JobState.UNKNOWN, "EXPEDITING")


def test_ended_jobs_are_read_from_the_accounting() -> None:
    text = (
        "18|FAILED|c3node2|1795896515|1795896517|0:9\n"
        "17|FAILED|c3node2|1795896515|1795896517|3:0\n"
        "26|CANCELLED by 1000|(null)|1795896525|1795896525|0:0\n"
        "27|RUNNING|c3node1|1795896525|Unknown|0:0\n"
        "28|NODE_FAIL|c3node1|1795896525|1795896600|0:0\n"
        "28|COMPLETED|c3node2|1795896700|1795896800|0:0\n"
    )
    jobs = read_accounting(text)
    assert [(job, status.scheduler_state, status.exit_code) for job, status in jobs.items()] == [
        ("18", "FAILED", -9),
        ("17", "FAILED", 3),
        ("26", "CANCELLED", 0),
        ("28", "COMPLETED", 0),
    ]
    assert (jobs["26"].nodes, jobs["28"].nodes, jobs["28"].ends_at) == ((), ("c3node2",), 1795896800)


def test_partitions_are_read_with_the_sets_of_their_nodes() -> None:
    text = (
        "batch*|up|planned|1|2|8000|1:00:00|1-infinite|(null)\n"
        "batch*|up|allocated|2|2|8000|1:00:00|1-infinite|(null)\n"
        "gpu|up|idle|3|64|256000|2-12:00:00|1-4|gpu:a100:4(S:0-1),nvme:1\n"
        "gpu|up|idle*|1|64|256000|2-12:00:00|1-4|gpu:a100:4(S:0-1),nvme:1\n"
        "gpu|up|mixed|1|32|128000|2-12:00:00|1-4|gpu:2\n"
        "empty|down|n/a|0|0|0|infinite|1|\n"
    )
    batch, gpu, empty = read_partitions(text)
    assert (batch.name, batch.default, batch.nodes, batch.idle, batch.limit_minutes) == ("batch", True, 3, 0, 60)
    assert gpu == Partition(
        name="gpu",
        default=False,
        state="up",
        nodes=5,
        idle=3,
        cores=32,
        memory_mb=128000,
        gpus=4,
        limit_minutes=3600,
        max_nodes=4,
    )
    assert (empty.state, empty.nodes, empty.limit_minutes, empty.max_nodes) == ("down", 0, None, 1)


def test_a_verdict_has_the_estimate_and_slurms_words() -> None:
    accepted = "sbatch: Job 2 to start at 1795896426 using 2 processors on nodes c3node[1-2] in partition batch\n"
    words = "Job 2 to start at 1795896426 using 2 processors on nodes c3node[1-2] in partition batch"
    assert read_verdict(0, accepted) == Verdict(True, words, 1795896426, ("c3node1", "c3node2"))
    refused = "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid partition name specified\n"
    words = "invalid partition specified: nope; Invalid partition name specified"
    assert read_verdict(1, refused) == Verdict(False, words)


@pytest.mark.parametrize(
    ("text", "outage"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", True),
        ("sbatch: error: If munged is up, restart with --num-threads=10\nProtocol authentication error", True),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", False),
        ("allocation failure: Invalid feature specification", False),
        ("sbatch: error: Invalid generic resource (gres) specification", False),
    ],
)
def test_an_outage_is_told_from_a_refusal(text: str, outage: bool) -> None:
    assert is_outage(text) is outage
    assert "error:" not in scheduler_words(text)


# --- lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", "node1"),
        ("node[01-03,7],gpu2", "node01 node02 node03 node7 gpu2"),
        ("nid[000998-001001]", "nid000998 nid000999 nid001000 nid001001"),
        ("rack[1-2]n[3-4]", "rack1n3 rack1n4 rack2n3 rack2n4"),
        ("a,b[1,3]-ib,c.d", "a b1-ib b3-ib c.d"),
        ("(null)", ""),
        ("None assigned", ""),
        ("", ""),
    ],
)
def test_a_list_of_nodes_is_expanded(text: str, names: str) -> None:
    assert expand_hostlist(text) == tuple(names.split())


def test_a_list_of_core_counts_is_expanded() -> None:
    assert expand_repeats("2(x3),4") == (2, 2, 2, 4)
    assert expand_repeats("128") == (128,)
    assert expand_repeats("") == ()


# --- allocations

SLURM_JOB = {
    "SLURM_JOB_ID": "29",
    "SLURM_JOB_NODELIST": "c3node[1-2]",
    "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
    "SLURM_GPUS_PER_NODE": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


def test_the_allocation_of_a_slurm_job_is_read_from_its_variables() -> None:
    allocation = Allocation(
        scheduler="slurm", job_id="29", nodes=("c3node1", "c3node2"), cores=(2, 2), gpus_per_node=4, ends_at=None
    )
    assert current_allocation(SLURM_JOB) == allocation
    later = current_allocation({**SLURM_JOB, "SLURM_JOB_END_TIME": "1795896817"})
    assert later is not None and later.ends_at == 1795896817
    typed = current_allocation({"SLURM_JOB_ID": "1", "SLURM_NODELIST": "n1", "SLURM_GPUS_PER_NODE": "a100:4,v100:1"})
    assert typed is not None and (typed.nodes, typed.gpus_per_node) == (("n1",), 5)


def test_the_allocation_of_a_pbs_job_is_read_from_its_file(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("x1000\nx1000\nx1002\n")
    variables = {"PBS_NODEFILE": str(nodes), "PBS_JOBID": "7.server"}
    assert current_allocation(variables) == Allocation(scheduler="pbs", job_id="7.server", nodes=("x1000", "x1002"))
    nodes.unlink()
    assert current_allocation(variables) is None
    assert current_allocation({}) is None


# --- requests


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"nodes": 0, "minutes": 5}, "nodes", "nodes of an allocation is 0; valid is 1 or more"),
        ({"nodes": 1, "minutes": 0}, "minutes", "valid is 1 or more"),
        ({"nodes": 1, "minutes": 5, "gpus_per_node": -1}, "gpus_per_node", "valid is 0 or more"),
        ({"nodes": 1, "minutes": 5, "lines": ("exclusive",)}, "lines", "valid is one option of the submit command"),
    ],
)
def test_a_request_that_is_wrong_names_the_field(fields: dict[str, int], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        AllocationRequest(**fields)  # type: ignore[arg-type]
    assert caught.value.field == field


PARTITION = Partition(
    name="gpu",
    default=True,
    state="up",
    nodes=8,
    idle=3,
    cores=32,
    memory_mb=128000,
    gpus=4,
    limit_minutes=60,
    max_nodes=4,
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nodes": 4, "minutes": 60, "gpus_per_node": 4}, ""),
        ({"nodes": 5, "minutes": 60}, "gives a job 4 nodes at most, not 5"),
        ({"nodes": 4, "minutes": 61}, "gives a job 60 minutes at most, not 61"),
        ({"nodes": 5, "minutes": 61, "qos": "large"}, ""),
        ({"nodes": 9, "minutes": 1, "qos": "large"}, "has 8 nodes, and 9 were asked for"),
        ({"nodes": 1, "minutes": 1, "gpus_per_node": 8}, "has nodes with 4 GPUs at most, not 8"),
    ],
)
def test_a_partition_says_which_limit_a_request_exceeds(fields: dict[str, int], words: str) -> None:
    problem = PARTITION.why_too_small(AllocationRequest(**fields))  # type: ignore[arg-type]
    assert words in problem
    assert bool(problem) is bool(words)


# --- the commands


def install(folder: Path, name: str, script: str) -> dict[str, str]:
    """Variables with whose PATH the command `name` is this script."""
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.anyio
@pytest.mark.parametrize("line", ["--array=1-3", "--arr=1-3", "-a1", "--wait", "-W", "--output=x", "--wrap=true"])
async def test_a_line_that_changes_what_a_job_is_is_refused(line: str, tmp_path: Path) -> None:
    slurm = Slurm(install(tmp_path, "sinfo", "true"))
    with pytest.raises(InvalidRequest, match="cannot be given to the scheduler"):
        await slurm.submit(AllocationRequest(nodes=1, minutes=1, lines=(line,)), "#!/bin/sh\n", tmp_path / "log")


@pytest.mark.anyio
@pytest.mark.parametrize("line", ["--nodes=4", "-N4", "-N 4", "-HN4", "--time=9", "--tim=9", "-t9", "--clusters=x"])
async def test_a_line_that_would_pass_a_limit_is_refused_with_what_to_do(line: str, tmp_path: Path) -> None:
    slurm = Slurm(install(tmp_path, "sinfo", "true"))
    with pytest.raises(InvalidRequest, match=r"of sbatch: (give nodes|give minutes|a session has one job)"):
        await slurm.submit(AllocationRequest(nodes=1, minutes=1, lines=(line,)), "#!/bin/sh\n", tmp_path / "log")


@pytest.mark.anyio
@pytest.mark.parametrize("line", ["--nodelist=n1", "-w n1", "--no-requeue", "--wait-all-nodes=1", "-Aproject", "-H"])
async def test_other_lines_are_given_to_the_scheduler(line: str, tmp_path: Path) -> None:
    environment = install(tmp_path, "sinfo", "true") | install(
        tmp_path, "sbatch", f'echo "$@" >{tmp_path}/given; echo 7'
    )
    request = AllocationRequest(nodes=1, minutes=1, lines=(line,))
    assert await Slurm(environment).submit(request, "#!/bin/sh\n", tmp_path / "log") == "7"
    assert line in (tmp_path / "given").read_text()


@pytest.mark.anyio
async def test_a_command_that_does_not_answer_is_ended_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    slurm = Slurm(install(tmp_path, "sinfo", f"exec 3>{alive}; sleep 1000 & wait"), timeout_s=2)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(SchedulerUnavailable, match=r"sinfo gave no answer within 2 s"):
        await slurm.partitions()
    await wait_until(lambda: nobody_writes(reader), 60)
    os.close(reader)


def nobody_writes(reader: int) -> bool:
    """In the pipe of which this is the end that does not wait."""
    try:
        return not os.read(reader, 1)
    except BlockingIOError:
        return False


@pytest.mark.anyio
async def test_the_children_of_a_command_end_with_a_caller_that_is_canceled(tmp_path: Path) -> None:
    started, alive = tmp_path / "started", tmp_path / "alive"
    os.mkfifo(started)
    os.mkfifo(alive)
    slurm = Slurm(install(tmp_path, "sinfo", f"exec 3>{alive}; sleep 1000 & echo >{started}; wait"))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read_to_end, alive)
            async with anyio.create_task_group() as call:
                call.start_soon(slurm.partitions)
                await read_to_end(started)
                call.cancel_scope.cancel()


async def read_to_end(fifo: Path) -> None:
    """Ends when no process has the pipe open for writing."""
    await anyio.to_thread.run_sync(fifo.read_bytes)


@pytest.mark.anyio
async def test_users_formats_do_not_change_what_is_read(tmp_path: Path) -> None:
    script = 'echo "p*|up|idle|${#SINFO_FORMAT}|2|8000|infinite|1|(null)"'
    slurm = Slurm({**install(tmp_path, "sinfo", script), "SINFO_FORMAT": "%P"})
    (partition,) = await slurm.partitions()
    assert partition.nodes == 0, "the variable is not set"


@pytest.mark.anyio
async def test_a_machine_without_slurm_has_no_scheduler_and_says_why(tmp_path: Path) -> None:
    found = await find_scheduler({"PATH": str(tmp_path)})
    assert (found.scheduler, found.problem) == (None, NO_SCHEDULER)
    described = await describe_scheduler({"PATH": str(tmp_path), **SLURM_JOB})
    assert described.name == ""
    assert described.allocation == current_allocation(SLURM_JOB)
