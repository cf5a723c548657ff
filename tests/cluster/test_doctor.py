"""The doctor asks for nodes, and tells what they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.doctor_nodes import examine_nodes
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import Settings
from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.anyio


async def findings(folder: Path, nodes: int, **options: Any) -> dict[str, tuple[str, str]]:
    found = examine_nodes(ServicePaths(folder), Settings(), nodes, options, dragon=False)
    return {finding.what: (finding.verdict, finding.text) async for finding in found}


async def test_each_node_says_what_it_has_and_the_nodes_are_given_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    found = await findings(cluster.shared / "doctor", 2, partition="batch", minutes=5)
    assert {verdict for verdict, _ in found.values()} == {"there"}, json.dumps(found, indent=1)
    for node in cluster.nodes:
        assert found[f"{node}: folder"][1] == "the service's folder is seen"
        assert "rhapsody-mcp" in found[f"{node}: packages"][1] and "eth0" in found[f"{node}: network"][1]
    assert not cluster.run("squeue", "--noheader", "--format=%i").split()


async def test_what_the_scheduler_refuses_is_told_in_its_words(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    found = await findings(cluster.shared / "doctor", 2, partition="nowhere")
    assert found["dry run"][0] == "missing" and "nowhere" in found["dry run"][1] and "batch" in found["dry run"][1]
