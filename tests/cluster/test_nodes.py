"""Sessions over the nodes of an allocation that the program is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.backends.compute.nodes.allocated import AllocatedNodes
from rhapsody_mcp.model.errors import InvalidSettings
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import leftovers, running_owner

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    made = cluster.shared / str(request.node.name)
    made.mkdir()
    return made


async def refusal(cluster: Cluster, folder: Path, **options: Any) -> str:
    """The text with which a backend refuses these options; nothing is left."""
    async with running_owner(cluster, folder, "local", str(folder), json.dumps(options)) as owner:
        text = str((await owner.next("refused"))["text"])
        for node in cluster.nodes:
            assert await leftovers(cluster, node) == []
    return text


@pytest.mark.parametrize("shared", [False, True])
async def test_each_mode_of_task_runs_on_all_nodes(cluster: Cluster, folder: Path, shared: bool) -> None:
    first, second = cluster.nodes
    options = json.dumps({"modes": cluster.nodes, "shared": shared, "num_workers": 3})
    async with running_owner(cluster, folder, "local", str(folder), options) as owner:
        facts = (await owner.next("ready"))["facts"]
        modes = await owner.next("modes")
        await owner.next("closed")
        for node in cluster.nodes:
            assert await leftovers(cluster, node) == []
    assert (facts["num_workers"], sorted(facts["host"].split(", "))) == (3, cluster.nodes), "all nodes are the default"
    size = 100_000 * len(first)
    assert modes["longs"] == [[first, size], [second, size]]
    assert modes["inputs"] == [[second, first, str(size)], [first, second, str(size)]]
    place, value = modes["in_worker"]
    assert value == [place, second, str(size)]
    assert modes["program"] == 300_000
    assert modes["pinned"] == [second, f"{second}\n"]
    assert modes["kept"] == [second, first, second], "a file that a task has left is copied to the node that reads it"
    nodes, printed = modes["job"]
    assert sorted(nodes) == cluster.nodes
    assert printed == [nodes[0], nodes[0], nodes[1], nodes[1]]


async def test_more_nodes_than_the_allocation_has_are_refused(cluster: Cluster, folder: Path) -> None:
    text = await refusal(cluster, folder, num_nodes=3)
    assert "num_nodes is 3; valid is 1 to 2, the nodes of job" in text
    assert ", ".join(cluster.nodes) in text
    assert "sbatch --nodes=N" in text


def test_several_nodes_are_refused_outside_of_an_allocation() -> None:
    with pytest.raises(InvalidSettings, match="valid is 1, because this process is not in an allocation"):
        AllocatedNodes(2, {})
    assert AllocatedNodes(None, {}).count == 1


async def test_an_unknown_network_is_refused(cluster: Cluster, folder: Path) -> None:
    text = await refusal(cluster, folder, network_prefix="^hsn")
    assert "network_prefix is '^hsn', and no network interface of" in text
    assert "it has eth0 (10.77." in text
