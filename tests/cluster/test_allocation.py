"""What a process inside a job finds out about its nodes, on simulated nodes with four GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rhapsody_mcp.schedulers.allocation import Allocation, current_allocation
from rhapsody_mcp.schedulers.base import AllocationRequest
from rhapsody_mcp.schedulers.slurm import Slurm
from tests.cluster.cluster import Cluster, missing
from tests.processes import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(2, gpus=4) as started:
        yield started


async def test_a_job_knows_its_nodes_with_their_cores_and_gpus(cluster: Cluster) -> None:
    slurm = Slurm(cluster.environment)
    (batch, _) = await slurm.partitions()
    assert batch.gpus == 4
    request = AllocationRequest(nodes=2, minutes=5, gpus_per_node=2)
    variables = cluster.shared / "variables"
    script = f"#!/bin/sh\nenv -0 >{variables}.part && mv {variables}.part {variables}\n"
    job_id = await slurm.submit(request, script, cluster.shared / "log")
    await wait_until(variables.exists, 60)
    environment = dict(entry.split("=", 1) for entry in variables.read_text().split("\0") if "=" in entry)
    assert current_allocation(environment) == Allocation(
        scheduler="slurm", job_id=job_id, nodes=tuple(cluster.nodes), cores=(2, 2), gpus_per_node=4
    )
