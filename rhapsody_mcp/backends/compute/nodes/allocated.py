"""The nodes of the allocation that this process is in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rhapsody_mcp.engine.node.hardware import count_cores, is_host
from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.schedulers.allocation import Allocation, current_allocation

__all__ = ["AllocatedNodes", "PlannedNodes"]

_MANY_CORES = 1024


class AllocatedNodes:
    """The nodes of one backend: `count` of the allocation, or this node alone.

    Raises InvalidSettings where there are no `count` nodes. The default is all nodes of the allocation. With
    `slurm_only`, other allocations count as one node.
    """

    def __init__(
        self, count: int | None, environment: Mapping[str, str] = os.environ, *, slurm_only: bool = False
    ) -> None:
        allocation = current_allocation(environment)
        is_usable = allocation is not None and (allocation.scheduler == "slurm" or not slurm_only)
        self._allocation = allocation if is_usable else None
        self._lost: set[str] = set()
        available = max(1, len(self._allocation.nodes)) if self._allocation else 1
        if count is not None and (not isinstance(count, int) or not 1 <= count <= available):
            raise InvalidSettings(f"num_nodes is {count!r}; {_valid(allocation, self._allocation)}")
        self.count = count or available
        self.cores = self._count_cores()
        """The number of cores of each node; of other nodes, what the scheduler says."""

    def _count_cores(self) -> list[int]:
        if self.count == 1 or self._allocation is None:
            return [count_cores()]
        return list(self._allocation.cores[: self.count]) or [count_cores()] * self.count

    def names(self) -> list[str]:
        """Return the nodes for the next engine: nodes that were lost are left out, as long as others are left."""
        assert self._allocation is not None, "only an allocation has several nodes"
        names = [name for name in self._allocation.nodes if name not in self._lost]
        return (names or list(self._allocation.nodes))[: self.count]

    def are_some(self, names: Sequence[str]) -> bool:
        """Whether the allocation has other nodes than these."""
        return self._allocation is not None and len(names) < len(self._allocation.nodes)

    def lose(self, host: str) -> None:
        """Leave out the node with this host name from now on."""
        if self._allocation is not None:
            self._lost |= {name for name in self._allocation.nodes if is_host(name, host)}


class PlannedNodes(AllocatedNodes):
    """The nodes of an allocation that another process will be in. Their cores are not known: each counts as large."""

    def __init__(self, count: int) -> None:
        super().__init__(None, {})
        self.count, self.cores = count, [_MANY_CORES] * count


def _valid(allocation: Allocation | None, usable: Allocation | None) -> str:
    if allocation is None:
        return (
            "valid is 1, because this process is not in an allocation. Run it in a job of Slurm "
            "(sbatch --nodes=2 --no-kill --no-requeue ...), or have create_session ask for nodes."
        )
    where = " ".join(["job", *filter(None, [allocation.job_id]), "of", allocation.scheduler])
    if usable is None:
        return (
            f"valid is 1, because this backend runs on several nodes in jobs of Slurm alone, and this is {where}: use "
            'the local backend (backends=["local"] in create_session).'
        )
    names = ", ".join(allocation.nodes[:10]) + (", ..." if len(allocation.nodes) > 10 else "")
    return (
        f"valid is 1 to {len(allocation.nodes)}, the nodes of {where} ({names}), or None for all of them. A larger "
        "allocation has more, such as sbatch --nodes=N."
    )
