"""The backend that runs functions and programs in processes of this machine, without Dragon: for laptops and tests."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rhapsody_mcp.backends.compute.backend import ComputeBackend
from rhapsody_mcp.backends.compute.nodes.engine import NodesConfig
from rhapsody_mcp.backends.compute.nodes.steps import step_on
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Caps, TaskSpec

__all__ = ["LocalExecutionBackend"]

_NODES_START_LIMITS_S = (120.0, 180.0)
"""As `start_limits_s`: the nodes have a minute to come after the first has come."""


class LocalExecutionBackend(ComputeBackend):
    """Runs the same modes of task as the Dragon backend, without Dragon and without MPI."""

    launcher = "local"

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        num_nodes: int | None = None,
        network_prefix: str | None = None,
        name: str = "local",
        stall_s: float = 10.0,
        environment: Mapping[str, Any] | None = None,
        caps: Caps | None = None,
    ) -> None:
        """Without `num_workers` there is one worker for each core; without `num_nodes`, the backend runs on all nodes
        of the allocation that this process is in. `network_prefix` is a regular expression for the names of the network
        interfaces by which the nodes reach this node; the default is all interfaces."""
        super().__init__(num_workers, name, stall_s, environment, caps, num_nodes, network_prefix)
        if self.num_nodes > 1:
            self.start_limits_s = _NODES_START_LIMITS_S

    def _nodes_config(self) -> NodesConfig:
        nodes = self.nodes.names()
        link = [sys.executable, "-m", "rhapsody_mcp.engine.node_link"]
        return NodesConfig(nodes, step_on(nodes, link), self.network_prefix)

    def check(self, spec: TaskSpec) -> None:
        super().check(spec)
        if self.num_nodes == 1 and spec.layout.uses_mpi:
            raise InvalidTask(
                f"backend {self.name!r} runs no MPI, which needs the dragon backend: use a session that has it "
                '(create_session with backends=["dragon"]), or leave mpi out: its ranks then run as independent '
                "processes."
            )
