"""Sessions from the login node of a cluster: what becomes of their tasks and of the nodes, whatever is killed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client

from tests.cluster.cluster import Cluster
from tests.cluster.nodes import leftovers
from tests.services import OwnService, own_service

pytestmark = pytest.mark.anyio

FUNCTION = """
def run(number, seconds):
    import os, socket, time
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(f"{number}\\n")
    time.sleep(seconds)
    return [number, socket.gethostname()]
"""


WORLD = """
def world():
    import socket
    from mpi4py import MPI
    ranks = MPI.COMM_WORLD
    hosts = ranks.allgather(socket.gethostname())
    return [ranks.Get_size(), ranks.allreduce(ranks.Get_rank()), sorted(set(hosts))]
"""


class Login:
    """A service on the login node, and what its tasks write down: one line for each run."""

    def __init__(self, cluster: Cluster, service: OwnService) -> None:
        self.cluster, self.service = cluster, service
        self.runs_file = service.folder / "runs"

    def client(self) -> Any:
        return self.service.client()

    async def open(self, client: Client, **options: Any) -> None:
        arguments = {
            "name": "s",
            "backends": ["local"],
            "nodes": 2,
            "minutes": 10,
            "environment": {"variables": {"RUNS": str(self.runs_file)}},
            **options,
        }
        await call(client, "create_session", **arguments)

    async def submit(self, client: Client, count: int, seconds: float, **fields: Any) -> None:
        tasks = [{"name": f"t{n}", "source": FUNCTION, "args": [n, seconds], **fields} for n in range(count)]
        await call(client, "submit_tasks", session="s", tasks=tasks)

    async def wait(self, client: Client, within_s: float = 300, **arguments: Any) -> dict[str, Any]:
        """The state of the session once all its tasks have ended."""
        with anyio.fail_after(within_s):
            while True:
                state = await call(client, "wait_tasks", **{"session": "s", "timeout_s": 5, **arguments})
                if not {"QUEUED", "RUNNING", "WAITING"} & state["counts"].keys():
                    return state

    async def until_started(self, count: int, within_s: float = 180) -> None:
        with anyio.fail_after(within_s):
            while len(self.runs) < count:  # noqa: ASYNC110 - lines of a file on the nodes are no event
                await anyio.sleep(0.1)

    @property
    def runs(self) -> Counter[str]:
        """How often each task ran."""
        return Counter(self.runs_file.read_text().split()) if self.runs_file.exists() else Counter()

    async def run_again(self, within_s: float = 120, after: str = "") -> None:
        """Have the scheduler end the one job, at once after these lines for the shell, and let it start again: Slurm
        holds it back for two minutes."""
        (job,) = self.jobs()
        self.cluster.run("sh", "-ec", f"{after}\nscontrol requeue {job}")
        with anyio.fail_after(within_s):
            while "PENDING" not in self.cluster.run("squeue", "-h", "--format=%T", "--jobs", job):  # noqa: ASYNC110
                await anyio.sleep(0.5)
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def jobs(self) -> list[str]:
        return self.cluster.run("squeue", "--noheader", "--format=%i").split()

    async def until_no_job(self, within_s: float = 120) -> None:
        with anyio.fail_after(within_s):
            while self.jobs():  # noqa: ASYNC110 - the scheduler has no event for it
                await anyio.sleep(0.5)

    async def until_gone(self, job: str, within_s: float = 120) -> None:
        with anyio.fail_after(within_s):
            while job in self.jobs():  # noqa: ASYNC110 - the scheduler has no event for it
                await anyio.sleep(0.5)

    async def until_no_job_but_pending(self, within_s: float) -> None:
        """Wait until no job holds a node."""
        with anyio.fail_after(within_s):
            while self.cluster.run("squeue", "--noheader", "--states=RUNNING,COMPLETING").split():  # noqa: ASYNC110
                await anyio.sleep(0.5)

    def processes(self, node: str) -> list[str]:
        """The processes of ours on a node."""
        listing = self.cluster.run(*self.cluster.on(node, "ps", "-eo", "pid=,args="))
        return [line for line in listing.splitlines() if "rhapsody_mcp" in line]

    def left(self, node: str) -> list[str]:
        """What is left of sessions on a node: processes, and files in its own folders."""
        listing = "ls -d /tmp/rhapsody-*/* /dev/shm/* 2>/dev/null || :"
        files = self.cluster.run(*self.cluster.on(node, "sh", "-c", listing))
        return [*self.processes(node), *files.split()]

    def kill(self, node: str, words: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the one process on the node whose command line has these words."""
        (line,) = [line for line in self.processes(node) if words in line]
        self.cluster.run(*self.cluster.on(node, "kill", f"-{number}", line.split()[0]))


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, answer.content
    return answer.structured_content or {}


@pytest.fixture
def login(cluster: Cluster) -> Iterator[Login]:
    cluster.wait_until_idle()
    with own_service(cluster.shared) as service:
        service.environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
        yield Login(cluster, service)


@asynccontextmanager
async def closed_at_the_end(login: Login, client: Client) -> AsyncIterator[None]:
    """Close the session, and see that nothing of it is left."""
    yield
    await call(client, "close_session", session="s", force=True)
    await login.until_no_job()
    for node in login.cluster.nodes:
        assert await leftovers(login.cluster, node) == [], node


async def test_tasks_of_each_kind_run_on_the_nodes_of_a_job_and_the_job_ends_with_the_session(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        async with closed_at_the_end(login, client):
            await login.submit(client, 8, 1)
            job = {"name": "job", "executable": "/bin/sh", "arguments": ["-c", "hostname"], "ranks": 4}
            big = {"name": "big", "source": "def big():\n    return 'x' * 200_000"}
            size = {"name": "size", "source": "def size(text):\n    return len(text)", "args": [{"ref": "big"}]}
            kept = {"name": "kept", "executable": "sh", "arguments": ["-c", "hostname > kept.txt"], "cwd": "/tmp"}
            path = {"ref": "kept", "path": "/files/kept.txt"}
            read = {"name": "read", "executable": "cat", "arguments": [path], "ranks": 2, "ranks_per_node": 1}
            files = [{**kept, "outputs": ["kept.txt"]}, read]
            mpi = {"name": "mpi", "source": WORLD, "mpi": True, "ranks": 4, "ranks_per_node": 2}
            await call(
                client, "submit_tasks", session="s", tasks=[{**job, "ranks_per_node": 2}, big, size, mpi, *files]
            )
            state = await login.wait(client)
            assert state["counts"] == {"DONE": 14}, state["failures"]
            text = await call(client, "get_result", session="s", task="kept", path="/files/kept.txt")
            copies = await call(client, "get_result", session="s", task="read")
            assert [rank["preview"] for rank in copies["ranks"]] == [f'"{text["result"].strip()}"'] * 2
            world = await call(client, "get_result", session="s", task="mpi")
            assert world["result"] == [4, 6, sorted(login.cluster.nodes)]
            result = await call(client, "get_result", session="s", task="size")
            assert result["result"] == 200_000
            hosts = await call(client, "get_result", session="s", task="job")
            assert set(login.cluster.nodes) <= set(str(hosts).replace("'", " ").replace(",", " ").split()), hosts
            assert len(login.jobs()) == 1


async def test_the_next_service_takes_over_what_runs(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        await login.submit(client, 24, 1)
        await login.until_started(6)
    os.kill(login.service.pid, signal.SIGKILL)
    async with login.client() as client:
        async with closed_at_the_end(login, client):
            state = await login.wait(client)
            assert state["counts"] == {"DONE": 24}
            assert login.runs == Counter({str(number): 1 for number in range(24)})


async def test_a_service_on_another_login_node_takes_over_what_runs(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        await login.submit(client, 24, 1)
        await login.until_started(6)
    first = login.service.pid
    login.service.launcher = ["unshare", "--uts", "sh", "-c", 'hostname login2 && exec "$@"', "sh"]
    refused = login.service.run("stdio")
    assert f"is held by process {first} on {socket.gethostname()}" in refused.stderr, refused
    os.kill(first, signal.SIGKILL)
    async with login.client() as client:
        async with closed_at_the_end(login, client):
            state = await login.wait(client)
            assert state["counts"] == {"DONE": 24}
            assert login.runs == Counter({str(number): 1 for number in range(24)})


async def test_a_service_that_stops_leaves_the_pilot_at_work(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        await login.submit(client, 12, 1)
        await login.until_started(4)
    stopped = login.service.run("service", "stop", "--force")
    assert stopped.returncode == 0, stopped.stderr
    await login.until_started(12)
    async with login.client() as client:
        async with closed_at_the_end(login, client):
            assert (await login.wait(client))["counts"] == {"DONE": 12}
            assert set(login.runs.values()) == {1}


@pytest.mark.parametrize("how", ["pilot killed", "scancel"])
async def test_the_end_of_an_allocation_loses_what_had_started_and_the_next_one_runs_the_rest(
    login: Login, how: str
) -> None:
    async with login.client() as client:
        await login.open(client, scheduler={"allocations": 2})
        async with closed_at_the_end(login, client):
            await login.submit(client, 12, 6)
            await login.until_started(8)
            if how == "scancel":
                login.cluster.run("scancel", *login.jobs())
            else:
                login.kill(login.cluster.nodes[0], "pilot.pilot")
            state = await login.wait(client)
            counts, runs = state["counts"], login.runs
            assert counts["DONE"] + counts["FAILED"] == 12 and 1 <= counts["FAILED"] <= 8
            assert runs == Counter({str(number): 1 for number in range(12)}), state["failures"]
            assert all("lost" in str(failure) for failure in state["failures"])


async def test_a_task_that_may_be_tried_again_runs_in_the_next_allocation(login: Login) -> None:
    async with login.client() as client:
        await login.open(client, scheduler={"allocations": 2})
        async with closed_at_the_end(login, client):
            await login.submit(client, 6, 2, retries=1)
            await login.until_started(4)
            login.kill(login.cluster.nodes[0], "pilot.pilot")
            state = await login.wait(client)
            assert state["counts"] == {"DONE": 6}
            assert all(count <= 2 for count in login.runs.values())


async def test_without_a_further_allocation_what_waits_is_lost_with_the_reason(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        async with closed_at_the_end(login, client):
            await login.submit(client, 12, 5)
            await login.until_started(4)
            login.cluster.run("scancel", *login.jobs())
            state = await login.wait(client)
            assert set(state["counts"]) <= {"DONE", "FAILED"} and set(login.runs.values()) == {1}
            assert "CANCELLED" in str(state["failures"]) and "allocations" in str(state["failures"])
            for dry_run in (True, False):
                task = {"executable": "/bin/hostname"}
                refused = await client.call_tool("submit_tasks", {"session": "s", "tasks": [task], "dry_run": dry_run})
                assert refused.is_error and "allocations_used_up: the time of this session is used up" in str(refused)


async def test_a_cut_between_login_node_and_nodes_loses_nothing(login: Login) -> None:
    with patient_slurm(login.cluster):
        async with login.client() as client:
            await login.open(client)
            async with closed_at_the_end(login, client):
                await login.submit(client, 16, 1)
                await login.until_started(4)
                with without_bridge_address(login.cluster):
                    await anyio.sleep(30)
                state = await login.wait(client)
                assert state["counts"] == {"DONE": 16}
                assert login.runs == Counter({str(number): 1 for number in range(16)})


async def test_a_scheduler_that_is_down_for_a_while_loses_nothing(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        login.cluster.stop_controller()
        try:
            await login.submit(client, 6, 1)
            await anyio.sleep(5)  # the request of the allocation fails meanwhile
        finally:
            login.cluster.start_controller()
        async with closed_at_the_end(login, client):
            assert (await login.wait(client))["counts"] == {"DONE": 6}
            assert len(login.jobs()) == 1


async def test_what_waits_at_the_walltime_gets_the_next_allocation(login: Login) -> None:
    async with login.client() as client:
        await login.open(client, minutes=1, scheduler={"allocations": 3})
        async with closed_at_the_end(login, client):
            saves = "trap 'echo $RHAPSODY_DEADLINE >$RUNS.saved; exit' TERM; sleep 600 & wait"
            program = {"name": "saves", "executable": "/bin/sh", "arguments": ["-c", saves]}
            await call(client, "submit_tasks", session="s", tasks=[program])
            await login.submit(client, 20, 13)
            state = await login.wait(client, 480)
            assert set(state["counts"]) <= {"DONE", "FAILED"} and state["counts"]["DONE"] >= 10
            assert login.runs == Counter({str(number): 1 for number in range(20)})
            saved = login.service.folder / "runs.saved"
            assert abs(float(saved.read_text()) - saved.stat().st_mtime) < 30
            assert all("time of its allocation was up" in failure["error"] for failure in state["failures"])


async def test_a_preempted_job_that_is_queued_again_goes_on_with_what_had_not_started(login: Login) -> None:
    async with login.client() as client:
        await login.open(client, scheduler={"lines": ["--requeue"], "allocations": 2})
        async with closed_at_the_end(login, client):
            await login.submit(client, 8, 10)
            await login.until_started(4)
            await login.run_again()
            state = await login.wait(client)
            assert state["counts"]["DONE"] >= 4 and set(login.runs.values()) == {1} and len(login.runs) == 8


async def test_a_job_that_is_run_again_while_no_service_is_there_runs_nothing_twice(login: Login) -> None:
    async with login.client() as client:
        await login.open(client, scheduler={"lines": ["--requeue"]})
        await login.submit(client, 8, 15)
        await login.until_started(4)
    os.kill(login.service.pid, signal.SIGKILL)
    await login.run_again()
    async with login.client() as client:
        async with closed_at_the_end(login, client):
            state = await login.wait(client)
            assert {*login.runs.values()} == {1}
            assert set(state["counts"]) == {"DONE", "FAILED"} and state["counts"]["DONE"] >= 4
            # a task whose start was written down when the job ended is lost, also where its own first line did not run
            assert sum(state["counts"].values()) == 8 and len(login.runs) >= state["counts"]["DONE"]


async def test_what_the_scheduler_ends_before_the_pilot_takes_no_waiting_task_along(login: Login) -> None:
    async with login.client() as client:
        await login.open(client, scheduler={"lines": ["--requeue"], "allocations": 2})
        async with closed_at_the_end(login, client):
            await login.submit(client, 8, 10)
            await login.until_started(4)
            ends = list[str]()
            for node in login.cluster.nodes:
                pids = [line.split()[0] for line in login.processes(node) if "rhapsody_mcp.engine.worker" in line]
                ends.append(shlex.join(login.cluster.on(node, "kill", "-TERM", *pids)))
            busy = "sleep 0.7"  # as a busy node keeps the pilot's signal back; nothing starts for 2 s
            await login.run_again(after="\n".join([*ends, busy]))
            state = await login.wait(client)
            assert state["counts"] == {"DONE": 4, "FAILED": 4} and set(login.runs.values()) == {1}


async def test_a_node_that_dies_takes_its_own_tasks_alone(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        async with closed_at_the_end(login, client):
            await login.submit(client, 12, 4, retries=1)
            await login.until_started(4)
            login.cluster.kill(login.cluster.nodes[1])
            try:
                state = await login.wait(client)
            finally:
                login.cluster.start(login.cluster.nodes[1])
            assert state["counts"] == {"DONE": 12}
            assert sum(login.runs.values()) <= 14


async def test_a_pilot_whose_node_dies_gives_the_other_nodes_back(login: Login) -> None:
    first, second = login.cluster.nodes
    async with login.client() as client:
        await login.open(client, scheduler={"allocations": 2})
        async with closed_at_the_end(login, client):
            await login.submit(client, 12, 8)
            await login.until_started(4)
            login.cluster.kill(first)
            try:
                await login.until_no_job_but_pending(300)
                assert not login.processes(second)
            finally:
                login.cluster.start(first)
            state = await login.wait(client)
            assert login.runs == Counter({str(number): 1 for number in range(12)})
            assert state["counts"]["DONE"] >= 8
            assert all(f"its pilot was on node {first}, which is down" in lost["error"] for lost in state["failures"])


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """The file system of the folder has no room."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - 2**24)
        while True:
            file.seek(0, os.SEEK_END)
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


async def test_a_shared_folder_that_is_full_for_a_while_loses_nothing_that_runs(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        async with closed_at_the_end(login, client):
            await login.submit(client, 16, 3)
            await login.until_started(4)
            with filled(login.cluster.shared):
                await anyio.sleep(8)  # two waves of the tasks end and start meanwhile
                with pytest.raises(AssertionError, match="are free on the disk"):
                    await call(client, "submit_tasks", session="s", tasks=[{"name": "one", "executable": "/bin/true"}])
            state = await login.wait(client)
            assert sum(state["counts"].values()) == 16 and state["counts"]["DONE"] >= 4, state
            assert set(login.runs.values()) == {1}
            assert len(login.runs) >= state["counts"]["DONE"]
            assert all("No space left" in failure["error"] for failure in state["failures"]), state["failures"]


async def test_a_service_that_is_killed_while_a_session_closes_closes_the_session_next_time(login: Login) -> None:
    async with login.client() as client:
        await login.open(client)
        await login.submit(client, 8, 600)
        await login.until_started(4)
        login.cluster.stop_controller()
        try:
            async with anyio.create_task_group() as closing:
                closing.start_soon(partial(call, client, "close_session", session="s", force=True))
                with anyio.fail_after(60):
                    while (await call(client, "list_sessions"))["sessions"]:  # noqa: ASYNC110
                        await anyio.sleep(0.1)
                closing.cancel_scope.cancel()
            os.kill(login.service.pid, signal.SIGKILL)
        finally:
            login.cluster.start_controller()
    async with login.client() as client:
        assert (await call(client, "list_sessions"))["sessions"] == []
        await login.until_no_job()
    assert not any(map(login.left, login.cluster.nodes))


async def test_a_pilot_that_nobody_needs_gives_its_nodes_back(login: Login) -> None:
    settings = login.service.folder / "settings.yaml"
    settings.write_text("pilot_idle_s: 15\n")
    async with login.service.client("auto", "--config", settings) as client:
        await login.open(client)
        await login.submit(client, 4, 1)
        await login.wait(client)
    os.kill(login.service.pid, signal.SIGKILL)
    await login.until_no_job()
    async with login.client() as client:
        async with closed_at_the_end(login, client):
            assert (await login.wait(client))["counts"] == {"DONE": 4}


@contextmanager
def patient_slurm(cluster: Cluster) -> Iterator[None]:
    """Slurm takes silent nodes for dead after 300 s, in the place of the 20 s of this cluster."""
    file = cluster.folder / "slurm.conf"
    before = file.read_text()
    file.write_text(before.replace("SlurmdTimeout=20\n", "SlurmdTimeout=300\n"))
    cluster.run("scontrol", "reconfigure")
    try:
        yield
    finally:
        file.write_text(before)
        cluster.run("scontrol", "reconfigure")


@contextmanager
def without_bridge_address(cluster: Cluster) -> Iterator[None]:
    """The nodes reach each other, and not the login node."""
    bridge = f"brsim{cluster.number}"
    subprocess.run(["ip", "addr", "del", f"10.77.{cluster.number}.1/24", "dev", bridge], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "addr", "add", f"10.77.{cluster.number}.1/24", "dev", bridge], check=True)


@pytest.mark.dragon_nodes
async def test_a_pipeline_of_inference_and_training_runs_on_dragon_and_vllm(login: Login) -> None:
    """Dragon starts in one to six minutes on simulated nodes, so this runs where it is asked for, with
    `-m dragon_nodes`."""
    async with login.client() as client:
        await login.open(client, backends=["dragon", "vllm"], minutes=30)
        async with closed_at_the_end(login, client):
            prompts = {"name": "samples", "prompt": ["Write a sample."] * 8, "max_tokens": 64}
            count = "def count(answers):\n    import socket\n    return [len(answers), socket.gethostname()]"
            train = {"name": "train", "source": count, "args": [{"ref": "samples"}]}
            ranks = {"name": "ranks", "executable": "hostname", "ranks": 4, "ranks_per_node": 2, "after": ["train"]}
            mpi = {"name": "mpi", "source": WORLD, "mpi": True, "ranks": 4, "ranks_per_node": 2, "after": ["train"]}
            await call(client, "submit_tasks", session="s", tasks=[prompts, train, ranks, mpi])
            state = await login.wait(client, 900)
            assert state["counts"] == {"DONE": 4}, state["failures"]
            assert (await call(client, "get_result", session="s", task="train"))["result"][0] == 8
            assert (await call(client, "get_result", session="s", task="mpi"))["result"][:2] == [4, 6]


@pytest.mark.ci
async def test_vllm_has_servers_on_each_node_and_outlives_one(login: Login) -> None:
    """Two servers start on one machine here, so this runs where it is asked for, with `-m ci`."""
    second = login.cluster.nodes[1]
    async with login.client() as client:
        await login.open(client, backends=["vllm"], minutes=30)
        async with closed_at_the_end(login, client):
            prompts = {"name": "first", "prompt": [f"Write sample {n}." for n in range(32)], "max_tokens": 32}
            await call(client, "submit_tasks", session="s", tasks=[prompts])
            assert (await login.wait(client, 300))["counts"] == {"DONE": 1}
            assert all(any("vllm" in line for line in login.processes(node)) for node in login.cluster.nodes)
            login.cluster.kill(second)
            try:
                await call(client, "submit_tasks", session="s", tasks=[{**prompts, "name": "second"}])
                assert (await login.wait(client, 300))["counts"] == {"DONE": 2}
            finally:
                login.cluster.start(second)
            answers = (await call(client, "get_result", session="s", task="second"))["result"]
            assert len(answers) == 32
