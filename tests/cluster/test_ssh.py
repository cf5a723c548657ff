"""Sessions over hosts that are reached by ssh, without a scheduler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from mcp import Client

from rhapsody_mcp.doctor_nodes import examine_nodes
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState
from rhapsody_mcp.schedulers.options import AllocationProfile
from rhapsody_mcp.schedulers.ssh_hosts import SshHosts
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import Settings
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import ROOT
from tests.cluster.sshd import SshServers
from tests.cluster.test_pilots import Login, call
from tests.services import own_service

pytestmark = pytest.mark.anyio


class Hosts(Login):
    """A service on a machine that reaches the nodes by ssh."""

    ssh: SshServers

    async def open(self, client: Client, **options: Any) -> None:
        scheduler = {"hosts": self.cluster.nodes, "setup": [f"export PATH={self.ssh.path}:$PATH"]}
        await super().open(client, **{**options, "scheduler": scheduler | options.get("scheduler", {})})

    def scheduler(self) -> SshHosts:
        return SshHosts(self.cluster.nodes, {**os.environ, **self.service.environment})


@pytest.fixture(scope="module")
def servers(cluster: Cluster) -> Iterator[SshServers]:
    if shutil.which("sshd", path="/usr/sbin") is None or shutil.which("ssh") is None:
        pytest.skip("hosts reached by ssh need the packages openssh-server and openssh-client")
    with SshServers(cluster) as servers:
        yield servers


@pytest.fixture
def hosts(cluster: Cluster, servers: SshServers) -> Iterator[Hosts]:
    with own_service(cluster.shared) as service:
        service.environment = {"PATH": f"{servers.path}{os.pathsep}{os.environ['PATH']}"}
        hosts = Hosts(cluster, service)
        hosts.ssh = servers
        yield hosts


@asynccontextmanager
async def closed_at_the_end(hosts: Hosts, client: Client) -> AsyncIterator[None]:
    """Close the session, and see that nothing runs on any node, and that all nodes are free."""
    yield
    await call(client, "close_session", session="s", force=True)
    assert [hosts.processes(node) for node in hosts.cluster.nodes if hosts.cluster.has_power(node)] == [[], []]
    assert (await hosts.scheduler().partitions())[0].idle == 2


async def test_functions_and_programs_run_on_all_hosts(hosts: Hosts) -> None:
    async with hosts.client() as client:
        await hosts.open(client)
        async with closed_at_the_end(hosts, client):
            await hosts.submit(client, 8, 1)
            job = {"name": "job", "executable": "/bin/sh", "arguments": ["-c", "hostname"], "ranks": 4}
            big = {"name": "big", "source": "def big():\n    return 'x' * 200_000"}
            size = {"name": "size", "source": "def size(text):\n    return len(text)", "args": [{"ref": "big"}]}
            mpi = {"name": "mpi", "source": "def world():\n    pass", "mpi": True, "ranks": 4, "ranks_per_node": 2}
            await call(client, "submit_tasks", session="s", tasks=[{**job, "ranks_per_node": 2}, big, size, mpi])
            state = await hosts.wait(client)
            assert state["counts"] == {"DONE": 11, "FAILED": 1}, state["failures"]
            assert "MPI over nodes needs a job of Slurm, and these nodes are reached by ssh" in str(state["failures"])
            places = [(await call(client, "get_result", session="s", task=f"t{n}"))["result"] for n in range(8)]
            assert [number for number, _ in places] == list(range(8))
            assert {place for _, place in places} == set(hosts.cluster.nodes)
            assert (await call(client, "get_result", session="s", task="size"))["result"] == 200_000
            ranks = str(await call(client, "get_result", session="s", task="job"))
            assert all(node in ranks for node in hosts.cluster.nodes)
            (row,) = (await call(client, "list_sessions"))["sessions"]
            allocation = row["allocation"]
            assert (allocation["state"], allocation["on"]) == ("RUNNING", hosts.cluster.nodes)


async def test_the_next_service_takes_over_what_runs(hosts: Hosts) -> None:
    async with hosts.client() as client:
        await hosts.open(client)
        await hosts.submit(client, 16, 1)
        await hosts.until_started(4)
    os.kill(hosts.service.pid, signal.SIGKILL)
    async with hosts.client() as client:
        async with closed_at_the_end(hosts, client):
            state = await hosts.wait(client)
            assert state["counts"] == {"DONE": 16}, state["failures"]
            assert hosts.runs == Counter({str(number): 1 for number in range(16)})


async def test_hosts_that_cannot_be_used_are_refused_in_words(hosts: Hosts) -> None:
    first, second = hosts.cluster.nodes
    async with hosts.client() as client:
        wrong = {"backends": ["local"], "nodes": 2}
        answer = await client.call_tool("create_session", {**wrong, "scheduler": {"hosts": [first, "nowhere"]}})
        assert answer.is_error
        assert f"can be used ({first}): host nowhere does not answer: Could not resolve hostname" in str(answer.content)
        (hosts.ssh.path_of_nodes / "ssh").rename(hosts.ssh.folder / "ssh-of-nodes")
        answer = await client.call_tool("create_session", {**wrong, "scheduler": {"hosts": [first, second]}})
        (hosts.ssh.folder / "ssh-of-nodes").rename(hosts.ssh.path_of_nodes / "ssh")
        assert f"{first} does not reach {second}: Host key verification failed" in str(answer.content)


async def test_hosts_that_another_session_has_are_refused_in_words(hosts: Hosts) -> None:
    async with hosts.client() as client:
        await hosts.open(client)
        await hosts.open(client, name="other", nodes=1)
        async with closed_at_the_end(hosts, client):
            await hosts.submit(client, 1, 1)
            await hosts.wait(client)
            await call(client, "submit_tasks", session="other", tasks=[{"executable": "hostname"}])
            state = await hosts.wait(client, session="other")
            assert state["counts"] == {"FAILED": 1}
            assert f"{hosts.cluster.nodes[0]} is in use by rhapsody-" in str(state["failures"]), state
        await call(client, "submit_tasks", session="other", tasks=[{"executable": "hostname"}])
        state = await hosts.wait(client, session="other")
        assert state["counts"] == {"FAILED": 1, "DONE": 1}, state["failures"]
        await call(client, "close_session", session="other", force=True)


async def test_an_allocation_ends_at_its_time_limit(hosts: Hosts) -> None:
    async with hosts.client() as client:
        await hosts.open(client, minutes=1)
        async with closed_at_the_end(hosts, client):
            await hosts.submit(client, 2, 300)
            state = await hosts.wait(client, 150)
            assert state["counts"] == {"FAILED": 2}
            assert all("time of its allocation was up" in failure["error"] for failure in state["failures"])


async def test_a_script_that_does_not_end_is_ended_at_its_time_limit(hosts: Hosts) -> None:
    scheduler, log = hosts.scheduler(), hosts.service.folder / "log"
    request = AllocationRequest(nodes=2, minutes=1, job_name="sleeper")
    job = await scheduler.submit(request, "#!/bin/sh\necho begun\nsleep 1000\n", log)
    with anyio.fail_after(100):
        while (status := (await scheduler.status([job]))[job]).state is not JobState.ENDED:  # noqa: ASYNC110
            await anyio.sleep(1)
    assert (status.scheduler_state, status.exit_code) == ("TIMEOUT", 124)
    assert status.ends_at is not None and status.started_at is not None
    assert 60 <= status.ends_at - status.started_at < 90  # when a script that goes on is killed
    assert log.read_text() == "begun\n"


@pytest.mark.parametrize("how", ["killed", "cut"])
async def test_a_host_that_is_lost_takes_its_own_tasks_alone(hosts: Hosts, how: str) -> None:
    second = hosts.cluster.nodes[1]
    async with hosts.client() as client:
        await hosts.open(client)
        async with closed_at_the_end(hosts, client):
            await hosts.submit(client, 12, 4, retries=1)
            await hosts.until_started(4)
            hosts.cluster.kill(second) if how == "killed" else hosts.cluster.cut(second)
            try:
                state = await hosts.wait(client, 180)
            finally:
                if how == "killed":
                    hosts.cluster.start(second)
                    hosts.ssh.start(second)
                else:
                    hosts.cluster.mend(second)
            assert state["counts"] == {"DONE": 12}
            assert sum(hosts.runs.values()) <= 14


async def test_the_doctor_looks_at_the_hosts_of_a_profile(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", hosts.service.environment["PATH"])
    setup = (f"export PATH={hosts.ssh.path}:$PATH",)
    profiles = {"lab": AllocationProfile(hosts=tuple(hosts.cluster.nodes), setup=setup)}
    settings = Settings(allocation_profiles=profiles, default_profile="lab")
    paths = ServicePaths(hosts.service.folder / "doctor")
    found = {one.what: one async for one in examine_nodes(paths, settings, 2, {"minutes": 5}, dragon=True)}
    assert {finding.verdict for finding in found.values()} == {"there"}, found
    assert found["dry run"].text == f"free: {', '.join(hosts.cluster.nodes)}"
    assert all(f"{node}: Python" in found for node in hosts.cluster.nodes)


async def test_an_interpreter_that_is_not_there_is_named(hosts: Hosts) -> None:
    async with hosts.client() as client:
        await hosts.open(client, scheduler={"python": "/no/python"})
        async with closed_at_the_end(hosts, client):
            await hosts.submit(client, 1, 1)
            state = await hosts.wait(client)
            assert state["counts"] == {"FAILED": 1}
            assert "the interpreter /no/python is not on this node, or has no rhapsody_mcp" in str(state["failures"])


@pytest.mark.parametrize("python", [sys.executable, "/no/python"])
async def test_hosts_need_not_see_the_folder_of_the_service(hosts: Hosts, python: str) -> None:
    with own_service() as service:  # in /tmp, of which each node has its own
        service.environment = hosts.service.environment
        hosts.service = service
        async with hosts.client() as client:
            await hosts.open(client, scheduler={"python": python})
            async with closed_at_the_end(hosts, client):
                big = {"name": "big", "source": "def big():\n    return 'x' * 200_000"}
                size = {"name": "size", "source": "def size(text):\n    return len(text)", "args": [{"ref": "big"}]}
                await call(client, "submit_tasks", session="s", tasks=[big, size])
                state = await hosts.wait(client)
                if python == sys.executable:
                    assert state["counts"] == {"DONE": 2}, state["failures"]
                    assert (await call(client, "get_result", session="s", task="size"))["result"] == 200_000
                else:
                    assert state["counts"] == {"FAILED": 1, "CANCELED": 1}
                    wrong = f"the interpreter {python} is not on this node, or has no rhapsody_mcp"
                    assert wrong in str(state["failures"]) and "its log is empty" not in str(state["failures"])


@pytest.mark.parametrize("kind", ["hosts", "pbs"])
def test_a_program_on_a_node_uses_all_nodes_of_its_allocation(hosts: Hosts, kind: str) -> None:
    first, second = hosts.cluster.nodes
    folder = hosts.service.folder
    (folder / "nodes").write_text(f"{first}\n{second}\n{second}\n")
    variable = f"RHAPSODY_HOSTS={first},{second}" if kind == "hosts" else f"PBS_NODEFILE={folder}/nodes"
    path = f"PATH={hosts.ssh.path}:{os.environ['PATH']}"
    options = json.dumps({"num_nodes": 2, "modes": [first, second]})
    owner = [sys.executable, "-m", "tests.cluster.owner", "local", str(folder), options]
    command = hosts.cluster.on(first, "env", "-C", str(ROOT), variable, path, *owner)
    events = [json.loads(line) for line in hosts.cluster.run(*command).splitlines() if line.startswith("{")]
    assert [event["event"] for event in events] == ["ready", "modes", "closed"]
    assert events[1]["longs"] == [[first, 100_000 * len(first)], [second, 100_000 * len(second)]]
    assert events[1]["inputs"] == [
        [second, first, str(100_000 * len(first))],
        [first, second, str(100_000 * len(second))],
    ]
    assert events[1]["job"] == [[first, second], [first, first, second, second]]
    assert [hosts.processes(node) for node in hosts.cluster.nodes] == [[], []]


@pytest.mark.ci
async def test_vllm_servers_run_on_all_hosts(hosts: Hosts) -> None:
    """vLLM takes a minute to start, so this runs where it is asked for, with `-m ci`."""
    file = hosts.service.folder / "config.yaml"
    file.write_text("server: {model: shipped, device: cpu}\nhardware: {num_nodes: 2}\n")
    async with hosts.client() as client:
        await hosts.open(client, backends=["local", "vllm"], config_file=str(file), minutes=30)
        async with closed_at_the_end(hosts, client):
            prompts = {"name": "samples", "prompt": ["Write a sample."] * 8, "max_tokens": 16}
            await call(client, "submit_tasks", session="s", tasks=[prompts])
            state = await hosts.wait(client, 600)
            assert state["counts"] == {"DONE": 1}, state["failures"]
            for node in hosts.cluster.nodes:
                assert any("vllm_launcher" in process for process in hosts.processes(node))


@pytest.mark.ci
async def test_dragon_runs_on_one_host(hosts: Hosts) -> None:
    """Dragon takes up to a minute to start on simulated nodes, so this runs where it is asked for, with `-m ci`."""
    async with hosts.client() as client:
        await hosts.open(client, backends=["dragon"], nodes=1)
        async with closed_at_the_end(hosts, client):
            await hosts.submit(client, 4, 1)
            state = await hosts.wait(client, 300)
            assert state["counts"] == {"DONE": 4}, state["failures"]
            result = await call(client, "get_result", session="s", task="t3")
            assert result["result"] == [3, hosts.cluster.nodes[0]]
