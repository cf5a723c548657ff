"""What a node has: cores, GPUs and memory, and what of them is in use."""

from __future__ import annotations

import math
from heapq import heappop, heappush

from rhapsody_mcp.engine.messages import Devices
from rhapsody_mcp.model.specs import Layout, Needs

__all__ = ["NodePool", "needs_text"]

_ROUNDING = 1e-6
"""Parts of cores are added and subtracted; this much is no core."""


_MANY = 1e9
"""More ranks than anything asks for."""


class NodePool:
    """The cores, GPUs and memory of one node. Functions and processes share the cores.

    A process takes what its task needs. A worker takes `worker_share` of a core while it has functions: all of one, or
    less where the node has more workers than cores. Memory counts where a task says how much it needs.
    """

    def __init__(
        self,
        cores: float,
        workers: int,
        *,
        gpus: int = 0,
        memory_bytes: float | None = None,
        cpus: tuple[int, ...] = (),
    ) -> None:
        self.cores, self.gpus, self.memory_bytes = cores, gpus, memory_bytes or math.inf
        self.worker_share = min(1.0, cores / workers) if workers else 1.0
        self.used_cores = 0.0
        self._used_memory = 0.0
        self._free_gpus, self._free_cpus = list(range(gpus)), list(cpus)
        self._taken: dict[str, tuple[float, float, list[Devices]]] = {}
        """By task: cores, memory, and the devices of each rank."""

    @property
    def free_cores(self) -> float:
        return self.cores - self.used_cores

    @property
    def is_idle(self) -> bool:
        return self.used_cores < _ROUNDING

    def room(self, needs: Needs) -> int:
        """How many ranks with these needs can start now."""
        return self._ranks(needs, self.free_cores, len(self._free_gpus), self.memory_bytes - self._used_memory)

    def most(self, needs: Needs) -> int:
        """How many ranks with these needs can run at a time on the whole node."""
        return self._ranks(needs, self.cores, self.gpus, self.memory_bytes)

    def _ranks(self, needs: Needs, cores: float, gpus: int, memory_bytes: float) -> int:
        ranks = math.floor(min(max(0.0, cores + _ROUNDING) / needs.counted_cores, _MANY))
        if needs.gpus:
            ranks = min(ranks, gpus // needs.gpus)
        if needs.memory_bytes is not None and memory_bytes < math.inf:
            ranks = min(ranks, int(max(0.0, memory_bytes) // needs.memory_bytes))
        return ranks

    def has_devices(self, needs: Needs, ranks: int) -> bool:
        """Whether the GPUs and the memory that so many ranks need are free, whatever cores are."""
        return ranks <= self._ranks(needs, math.inf, len(self._free_gpus), self.memory_bytes - self._used_memory)

    @property
    def has_room(self) -> bool:
        """Whether anything can start now: a part of a core is free."""
        return self.free_cores > _ROUNDING

    @property
    def has_room_for_worker(self) -> bool:
        return self.free_cores + _ROUNDING >= self.worker_share

    @property
    def workers_that_fit(self) -> int:
        return math.floor((self.free_cores + _ROUNDING) / self.worker_share)

    def take_worker(self) -> None:
        self.used_cores += self.worker_share

    def give_back_worker(self) -> None:
        self.used_cores = max(0.0, self.used_cores - self.worker_share)

    def take(self, uid: str, layout: Layout, ranks: int) -> tuple[Devices, ...]:
        """Take what these ranks of a task need; return the devices of each, or none where the task asked for none.

        More ranks than the node has cores share all of its cores.
        """
        needs = layout.needs
        cores, memory = min(ranks * needs.counted_cores, self.cores), float(ranks * (needs.memory_bytes or 0))
        asked = needs.gpus or (needs.cores or 0) >= 1
        devices = [self._take_devices(needs) for _ in range(ranks)] if asked else []
        self._taken[uid] = cores, memory, devices
        self.used_cores += cores
        self._used_memory += memory
        return tuple(devices)

    def _take_devices(self, needs: Needs) -> Devices:
        cores = int(needs.cores or 0)
        cpus = [heappop(self._free_cpus) for _ in range(cores)] if cores <= len(self._free_cpus) else []
        return Devices(tuple(cpus), tuple(heappop(self._free_gpus) for _ in range(needs.gpus)))

    def give_back(self, uid: str) -> None:
        """Undo `take`."""
        cores, memory, devices = self._taken.pop(uid)
        self.used_cores = max(0.0, self.used_cores - cores)
        self._used_memory -= memory
        for own in devices:
            for cpu in own.cpus:
                heappush(self._free_cpus, cpu)
            for gpu in own.gpus:
                heappush(self._free_gpus, gpu)


def needs_text(needs: Needs) -> str:
    """As in `4 cores, 1 GPU and 8 GB of memory`."""
    cores, gpus = needs.counted_cores, needs.gpus
    parts = [f"{cores:g} core{'' if cores <= 1 else 's'}"]
    parts += [f"{gpus} GPU{'' if gpus == 1 else 's'}"] if gpus else []
    parts += [f"{needs.memory_gb:g} GB of memory"] if needs.memory_gb is not None else []
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
