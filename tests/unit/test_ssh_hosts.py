"""Jobs on hosts without a scheduler, with a stand-in for ssh."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.engine.process.tree import living
from rhapsody_mcp.model.errors import SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus
from rhapsody_mcp.schedulers.ssh_hosts import SshHosts
from tests.processes import wait_until
from tests.ssh_stand_in import SshStandIn

pytestmark = pytest.mark.anyio

FOREVER = "#!/bin/sh\nexec sleep 1000\n"


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshStandIn:
    return SshStandIn(tmp_path, monkeypatch, "n1", "n2", "n3")


def request(nodes: int = 2, minutes: int = 5, name: str = "job-a") -> AllocationRequest:
    return AllocationRequest(nodes=nodes, minutes=minutes, job_name=name)


async def until_ended(hosts: SshHosts, job: str) -> JobStatus:
    with anyio.fail_after(30):
        while True:
            status = (await hosts.status([job]))[job]
            if status.state is JobState.ENDED:
                return status
            await anyio.sleep(0.1)


async def test_a_script_runs_on_the_first_host_and_knows_its_hosts(ssh: SshStandIn, tmp_path: Path) -> None:
    script = "#!/bin/sh\necho $RHAPSODY_HOSTS_JOB $RHAPSODY_HOSTS $RHAPSODY_HOSTS_END $STAND_IN_HOST; exit 3\n"
    hosts, log = SshHosts(["me@n1", "n2"]), tmp_path / "log"
    log.write_text("before\n")
    job = await hosts.submit(request(), script, log)
    status = await until_ended(hosts, job)
    assert (job, status.scheduler_state, status.exit_code) == ("job-a@me@n1", "FAILED", 3)
    assert status.nodes == ("me@n1", "n2") and status.explanation == ""
    before, own = log.read_text().splitlines()
    assert before == "before"
    words = own.split()
    assert words[:2] == ["job-a@me@n1", "me@n1,n2"] and words[3] == "n1"
    assert status.started_at is not None and int(words[2]) == status.started_at + 300


async def test_a_job_runs_until_it_is_canceled_with_all_its_processes(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts, pids = SshHosts(["n1"]), tmp_path / "pids"
    job = await hosts.submit(request(1), f"#!/bin/sh\nsleep 1000 &\necho $! $$ >{pids}\nwait\n", tmp_path / "log")
    status = (await hosts.status([job]))[job]
    assert (status.state, status.scheduler_state, status.nodes) == (JobState.RUNNING, "RUNNING", ("n1",))
    assert status.ends_at == (status.started_at or 0) + 300
    assert await hosts.find_jobs("job-a") == [job] and await hosts.find_jobs("job-b") == []
    await wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    await hosts.cancel(job)
    status = await until_ended(hosts, job)
    assert (status.scheduler_state, status.exit_code) == ("CANCELLED", -15)
    assert not living(map(int, pids.read_text().split()))
    await hosts.cancel(job)
    assert (await hosts.status(["job-z@n1"]))["job-z@n1"].state is JobState.UNKNOWN


async def test_a_host_belongs_to_one_job_until_the_job_has_ended(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts = SshHosts(["n1", "n2", "n3"])
    job = await hosts.submit(request(2), FOREVER, tmp_path / "log")
    assert (await hosts.partitions())[0].idle == 1
    other = await hosts.submit(request(1, name="job-b"), FOREVER, tmp_path / "log")
    assert other == "job-b@n3"
    until = r"\d\d:\d\d at most"
    busy = f"n1 is in use by job-a, until {until}; n2 is in use by job-a, until {until}; n3 is in use by job-b"
    with pytest.raises(SchedulerRefusal, match=f"2 nodes were asked for, and of the 3 hosts 0 can be used: {busy}"):
        await hosts.submit(request(2, name="job-c"), FOREVER, tmp_path / "log")
    assert not (await hosts.check(request(1), FOREVER)).accepted
    await hosts.cancel(job)
    assert (await hosts.partitions())[0].idle == 2
    third = await hosts.submit(request(2, name="job-c"), FOREVER, tmp_path / "log")
    assert (await hosts.status([third]))[third].nodes == ("n1", "n2")
    for one in (other, third):
        await hosts.cancel(one)


async def test_the_log_of_a_host_without_the_folder_comes_with_the_status(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts, folder = SshHosts(["n1"]), tmp_path / "state"
    folder.mkdir()
    moved = tmp_path / "elsewhere"
    real = ssh.folder / "ssh"
    real.write_text(
        real.read_text().replace("exec sh", f'mv {folder} {moved}; sh -c "$*"; e=$?; mv {moved} {folder}; exit $e; sh')
    )
    job = await hosts.submit(request(1), "#!/bin/sh\necho no interpreter; exit 1\n", folder / "log")
    status = await until_ended(hosts, job)
    assert (status.scheduler_state, status.explanation, status.nodes) == ("FAILED", "no interpreter", ())
    assert not (folder / "log").exists()


async def test_hosts_that_do_not_answer_are_named_with_the_words_of_ssh(ssh: SshStandIn, tmp_path: Path) -> None:
    ssh.switch_off("n2")
    ssh.add("n5", own_name="node5.site")
    hosts = SshHosts(["n1", "n2", "n5", "n9"])
    verdict = await hosts.check(request(2), FOREVER)
    assert not verdict.accepted
    assert "host n2 does not answer: connect to host n2 port 22: No route to host" in verdict.words
    assert "host n9 does not answer: Could not resolve hostname n9: Name or service not known" in verdict.words
    assert "host n5 calls itself node5.site: use that name" in verdict.words
    assert (await hosts.check(request(1), FOREVER)).nodes == ("n1",)
    (partition,) = await hosts.partitions()
    assert (partition.nodes, partition.idle, partition.cores) == (4, 1, os.cpu_count())
    with pytest.raises(SchedulerUnavailable, match="no host can be used: host n9 does not answer"):
        await SshHosts(["n9"]).submit(request(1), FOREVER, tmp_path / "log")


async def test_a_host_that_was_given_to_a_job_that_never_started_is_free_again(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts = SshHosts(["n1", "me@n1", "n2"])
    assert (await hosts.partitions())[0].nodes == 2
    for name in ("n1", "n2"):
        folder = ssh.host(name) / f"rhapsody-hosts-{os.getuid()}"
        (folder / "held").write_text(f"job-z me@n1 {time.time() + 1000:.0f}\n")
    assert "me@n1 is in use by job-z" in (await hosts.check(request(2), FOREVER)).words
    os.utime(ssh.host("n1") / f"rhapsody-hosts-{os.getuid()}" / "held", (1, 1))
    assert (await hosts.check(request(2), FOREVER)).nodes == ("me@n1", "n2")


async def test_a_job_is_looked_for_where_it_was_asked_for(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts = SshHosts(["n1", "n2"])
    job = await hosts.submit(request(1), FOREVER, tmp_path / "log")
    ssh.switch_off("n2")
    assert await hosts.find_jobs("job-a") == [job]
    with pytest.raises(SchedulerUnavailable, match="host n2 does not answer"):
        await SshHosts(["n1", "n2"]).find_jobs("job-a")
    await hosts.cancel(job)


async def test_a_host_that_is_silent_has_ended_its_job_once_the_time_is_up(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts = SshHosts(["n1"])
    job = await hosts.submit(request(1), FOREVER, tmp_path / "log")
    ssh.switch_off("n1")
    with pytest.raises(SchedulerUnavailable, match="host n1 does not answer"):
        await hosts.status([job])
    with pytest.raises(SchedulerUnavailable, match="host n1 does not answer"):
        await hosts.cancel(job)
    (ssh.host("n1") / "down").unlink()
    times = next(ssh.host("n1").glob("rhapsody-hosts-*/job-a/times"))
    times.write_text(f"{time.time() - 400:.0f} {time.time() - 100:.0f} n1")
    assert (await hosts.status([job]))[job].state is JobState.RUNNING
    await hosts.cancel(job)
    ssh.switch_off("n1")
    assert (await hosts.status([job]))[job].scheduler_state == "TIMEOUT"


async def test_a_job_that_was_killed_has_ended_without_an_exit_code(ssh: SshStandIn, tmp_path: Path) -> None:
    hosts = SshHosts(["n1"])
    job = await hosts.submit(request(1), FOREVER, tmp_path / "log")
    lines = next(ssh.host("n1").glob("rhapsody-hosts-*/job-a/pids")).read_text().splitlines()
    pids = [int(line.split()[0]) for line in lines]
    await wait_until(lambda: os.getpgid(pids[1]) == pids[1])
    os.kill(pids[0], 9)
    os.killpg(pids[1], 9)
    status = await until_ended(hosts, job)
    assert (status.scheduler_state, status.exit_code) == ("FAILED", None)
    assert status.reason.startswith("its processes ended without a word")
