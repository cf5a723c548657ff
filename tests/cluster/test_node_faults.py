"""What dies on a node of an engine takes its own tasks with it and no others, and leaves nothing."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.nodes import Allocated, kill, leftovers, processes, running_owner
from tests.processes import wait_until

pytestmark = pytest.mark.anyio

STALL_S = 8.0
"""A node that is silent for so long is lost."""
NEXT = "from rhapsody_mcp.engine.process.run_dirs import RunDir; RunDir().remove()"
"""What the next process of this package on a node does first: it deletes the folders of killed processes."""
OPTIONS = {"num_nodes": 2, "stall_s": STALL_S}


class Account(NamedTuple):
    """What became of the tasks of an owner."""

    where: dict[str, str]
    """The node on which each task that was running at the time of the fault ran."""
    ends: dict[str, list[str]]
    """State, cause, error and node of each task."""
    starts: dict[str, list[str]]
    """The nodes on which each task has started."""
    notices: list[str]

    def on(self, node: str) -> set[str]:
        return {task for task, place in self.where.items() if place == node}

    @property
    def failed(self) -> dict[str, str]:
        """The causes of the tasks that are not done."""
        return {task: end[1] for task, end in self.ends.items() if end[0] != "DONE"}

    def check(self, starts: int = 1) -> None:
        """Every task has ended, and was started as often as its end says, and no more often than it may be."""
        assert {task: end for task, end in self.ends.items() if end[0] not in ("DONE", "FAILED")} == {}
        assert {task for task in self.ends if task not in self.starts} <= set(self.failed)
        assert {task: nodes for task, nodes in self.starts.items() if len(nodes) > starts} == {}


Fault = Callable[[Allocated, dict[str, list[str]]], Awaitable[None]]


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    cluster.wait_until_idle(180)
    made = cluster.shared / str(request.node.name)
    made.mkdir()
    return made


async def account_of(
    cluster: Cluster,
    folder: Path,
    fault: Fault,
    heal: Callable[[], None] = lambda: None,
    backend: str = "local",
    start_s: float = 240,
    **options: Any,
) -> Account:
    """Run tasks on two nodes, with this fault in the middle. Nothing of the engine is left on the nodes, also before
    `heal` is called."""
    arguments = (backend, str(folder), json.dumps({**OPTIONS, **options}))
    async with running_owner(cluster, folder, *arguments) as owner:
        await owner.next("ready", start_s)
        running: dict[str, list[str]] = (await owner.next("running"))["where"]
        await fault(owner, running)
        owner.release()
        ended = await owner.next("ended")
        await owner.next("closed")
        await check_nothing_left(cluster)
        heal()
        where = {task: start[0] for task, start in running.items()}
        return Account(where, ended["tasks"], owner.starts(), ended["notices"])


async def check_nothing_left(cluster: Cluster, *nodes: str) -> None:
    for node in filter(cluster.has_power, nodes or cluster.nodes):
        assert await leftovers(cluster, node) == [], node


async def ended(cluster: Cluster, node: str, running: dict[str, list[str]]) -> None:
    """Wait until no task runs on the node any more."""
    pids = {int(pid) for place, pid in running.values() if place == node}
    await wait_until(lambda: pids.isdisjoint(processes(cluster, node)), 60)


PARTS = {
    "link": "rhapsody_mcp.engine.node_link",
    "keeper": "rhapsody_mcp.engine.keeper",
    "agent": f"^{sys.executable} -m rhapsody_mcp.engine.host",
}


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_of_a_node_that_is_killed_takes_the_tasks_of_its_node_with_it(
    cluster: Cluster, folder: Path, part: str
) -> None:
    second = cluster.nodes[1]

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        kill(cluster, second, PARTS[part])
        await ended(cluster, second, running)

    account = await account_of(cluster, folder, fault)
    account.check()
    assert account.failed == dict.fromkeys(account.on(second), "lost")


async def test_a_node_agent_that_is_killed_joins_again(cluster: Cluster, folder: Path) -> None:
    second = cluster.nodes[1]

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        kill(cluster, second, PARTS["agent"])
        await ended(cluster, second, running)

    account = await account_of(cluster, folder, fault, retries=1)
    account.check(starts=2)
    assert account.failed == {}
    assert all(len(account.starts[task]) == 2 for task in account.on(second))
    assert "joins again" in account.notices[0]


async def test_a_node_agent_that_hangs_when_it_is_started_again_is_given_up(cluster: Cluster, folder: Path) -> None:
    second = cluster.nodes[1]

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        kill(cluster, second, PARTS["agent"])
        await ended(cluster, second, running)
        await wait_until(lambda: bool(processes(cluster, second, PARTS["agent"])), 60)
        kill(cluster, second, PARTS["agent"], number=signal.SIGSTOP)
        await wait_until(lambda: not processes(cluster, second, PARTS["link"]), 240)

    account = await account_of(cluster, folder, fault, retries=2)
    account.check(starts=3)
    assert account.failed == {}
    assert any(f"node {second} was lost: it does not answer" in notice for notice in account.notices)


async def test_a_worker_that_is_killed_takes_its_function_with_it(cluster: Cluster, folder: Path) -> None:
    second = cluster.nodes[1]
    victims: list[str] = []

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        name, (_, pid) = next(item for item in running.items() if item[0].startswith("long") and item[1][0] == second)
        victims.append(name)
        cluster.run(*cluster.on(second, "kill", "-9", pid))

    account = await account_of(cluster, folder, fault)
    account.check()
    assert account.failed == dict.fromkeys(victims, "crashed")


async def test_a_launcher_that_is_killed_takes_the_engine_with_it(cluster: Cluster, folder: Path) -> None:
    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        kill(cluster, cluster.nodes[0], "^srun")
        for node in cluster.nodes:
            await ended(cluster, node, running)

    account = await account_of(cluster, folder, fault)
    account.check()
    assert account.failed == dict.fromkeys(account.where, "lost")


async def test_a_step_that_is_canceled_takes_the_engine_with_it(cluster: Cluster, folder: Path) -> None:
    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        cluster.run("scancel", f"{owner.job_id}.0")
        for node in cluster.nodes:
            await ended(cluster, node, running)

    account = await account_of(cluster, folder, fault)
    account.check()
    assert account.failed == dict.fromkeys(account.where, "lost")


async def test_an_owner_that_is_killed_leaves_nothing(cluster: Cluster, folder: Path) -> None:
    async with running_owner(cluster, folder, "local", str(folder), json.dumps(OPTIONS)) as owner:
        await owner.next("ready")
        await owner.next("running")
        kill(cluster, cluster.nodes[0], "tests.cluster.owner")
        await check_nothing_left(cluster, cluster.nodes[1])
        await wait_until(lambda: not processes(cluster, cluster.nodes[0], "rhapsody"), 60)
        cluster.run(*cluster.on(cluster.nodes[0], sys.executable, "-c", NEXT))
        await check_nothing_left(cluster)


async def test_a_cut_of_5_seconds_loses_nothing(cluster: Cluster, folder: Path) -> None:
    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        cluster.cut(cluster.nodes[1])
        await anyio.sleep(5)
        cluster.mend(cluster.nodes[1])

    account = await account_of(cluster, folder, fault, stall_s=10.0)
    account.check()
    assert (account.failed, account.notices) == ({}, [])


async def test_a_node_that_is_cut_off_is_lost_and_ends_what_it_has(cluster: Cluster, folder: Path) -> None:
    second = cluster.nodes[1]

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        cluster.cut(second)

    account = await account_of(cluster, folder, fault, lambda: cluster.mend(second), retries=1)
    account.check(starts=2)
    assert account.failed == {}
    assert f"node {second} was lost: it does not answer" in account.notices[0]


async def test_a_node_without_power_is_lost(cluster: Cluster, folder: Path) -> None:
    second = cluster.nodes[1]

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        cluster.kill(second)

    account = await account_of(cluster, folder, fault, lambda: cluster.start(second))
    account.check()
    assert account.failed == dict.fromkeys(account.on(second), "lost")


@pytest.mark.dragon_nodes
async def test_dragon_goes_on_without_a_dead_node_and_starts_again_without_it(cluster: Cluster, folder: Path) -> None:
    """Dragon starts in one to six minutes here, so this runs where it is asked for, with `-m dragon_nodes`."""
    first, second = cluster.nodes

    async def fault(owner: Allocated, running: dict[str, list[str]]) -> None:
        cluster.kill(second)
        again = [task for task, (node, _) in running.items() if node == second]
        await wait_until(lambda: all(owner.starts()[task] == [second, first] for task in again), 180)
        kill(cluster, first, "bin/dragon -m")
        await wait_until(lambda: all(len(owner.starts()[task]) == 2 + (task in again) for task in running), 600)

    account = await account_of(
        cluster,
        folder,
        fault,
        lambda: cluster.start(second),
        backend="dragon",
        start_s=600,
        retries=2,
        stall_s=30,
        num_workers=8,
    )
    account.check(starts=3)
    assert account.failed == {}
    assert any(f"node {second} was lost" in notice for notice in account.notices)
