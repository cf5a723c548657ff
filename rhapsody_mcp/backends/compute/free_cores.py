"""Finds the node with the most free cores without a look at the others."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from rhapsody_mcp.backends.compute.in_flight import Node

__all__ = ["FreeCores"]

_MOST_ENTRIES = 8  # for each node, before the outdated entries are dropped


class FreeCores:
    """The nodes of an engine by their free cores. `update` is to be called with each node whose free cores change."""

    def __init__(self) -> None:
        self._numbers: dict[Node, int] = {}
        self._added = 0
        self._heap: list[tuple[float, int, Node]] = []
        """An entry for each change of a node: minus its free cores, and its number. The newest one is right."""

    def add(self, node: Node) -> None:
        self._added += 1
        self._numbers[node] = self._added
        self.update(node)

    def remove(self, node: Node) -> None:
        del self._numbers[node]

    def update(self, node: Node) -> None:
        if node not in self._numbers:
            return
        heappush(self._heap, self._entry(node))
        if len(self._heap) > _MOST_ENTRIES * len(self._numbers):
            self._heap = [self._entry(node) for node in self._numbers]
            heapify(self._heap)

    def _entry(self, node: Node) -> tuple[float, int, Node]:
        return -node.pool.free_cores, self._numbers[node], node

    def roomiest(self) -> Node | None:
        """The node with the most free cores, of several the one that was added first."""
        while self._heap:
            minus_free, _, node = self._heap[0]
            if node in self._numbers and node.pool.free_cores == -minus_free and node.agent is not None:
                return node
            heappop(self._heap)
        return None
