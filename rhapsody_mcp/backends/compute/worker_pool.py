"""The workers of an engine; the idle ones are found without a look at the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heappop, heappush

from rhapsody_mcp.backends.compute.in_flight import Channel, Hold, Node, Worker

__all__ = ["WorkerPool", "nodes_with_room"]


class WorkerPool:
    """The workers by name. Names are numbers, and unique in an engine. `on_change` is called with a node whose free
    cores have changed."""

    def __init__(self, on_change: Callable[[Node], object]) -> None:
        self._on_change = on_change
        self._workers: dict[str, Worker] = {}
        self._count = 0
        self._starting: set[Worker] = set()
        self._idle: list[tuple[int, Worker]] = []
        """A heap of workers that may be idle, each at most once."""
        self._holding: dict[Worker, None] = {}
        """Workers that may have tasks which wait behind a running one."""

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def by_name(self) -> Mapping[str, Worker]:
        return self._workers

    @property
    def all_ready(self) -> bool:
        """Whether each worker has been ready."""
        return not self._starting

    def add(self, node: Node, window: int) -> Worker:
        self._count += 1
        worker = Worker(self._count, node, window)
        self._workers[worker.name] = node.workers[worker.name] = worker
        self._starting.add(worker)
        return worker

    def remove(self, worker: Worker) -> None:
        del self._workers[worker.name], worker.node.workers[worker.name]
        self._starting.discard(worker)
        self._holding.pop(worker, None)
        self._give_back_core(worker)

    def set_ready(self, worker: Worker, functions: Channel) -> None:
        worker.function_channel = functions
        self._starting.discard(worker)
        self.note_idle(worker)

    def give_core(self, worker: Worker) -> None:
        """The worker has functions; a call too many does nothing."""
        if not worker.has_core:
            worker.has_core = True
            worker.node.pool.take_worker()
            self._on_change(worker.node)

    def _give_back_core(self, worker: Worker) -> None:
        if worker.has_core:
            worker.has_core = False
            worker.node.pool.give_back_worker()
            self._on_change(worker.node)
            self.unpark(worker.node)

    def note_idle(self, worker: Worker) -> None:
        """The worker may have become idle; a call too many does nothing."""
        if not worker.assigned:
            self._give_back_core(worker)
        if worker.is_idle and not worker.is_listed:
            worker.is_listed = True
            heappush(self._idle, (worker.number, worker))

    def first_idle(self) -> Worker | None:
        """The idle worker that was started first, of those for which there is a core."""
        while self._idle:
            worker = self._idle[0][1]
            if worker.is_idle and (worker.has_core or worker.node.takes_worker):
                return worker
            heappop(self._idle)
            worker.is_listed = False
            if worker.is_idle:
                heappush(worker.node.parked, (worker.number, worker))
        return None

    def unpark(self, node: Node) -> None:
        """List as many idle workers of the node again as there is room for."""
        if not node.parked or node.hold is Hold.ALL:
            return
        room = node.pool.workers_that_fit
        while node.parked and room > 0:
            self.note_idle(heappop(node.parked)[1])
            room -= 1

    def note_holding(self, worker: Worker) -> None:
        """Tasks may wait in the worker behind a running one."""
        self._holding[worker] = None

    def take_holding(self) -> Iterator[Worker]:
        """Take out the workers whose waiting tasks can be recalled now."""
        for worker in list(self._holding):
            is_holding = len(worker.assigned) > 1
            if not is_holding or (worker.control_channel is not None and not worker.recalled):
                del self._holding[worker]
                if is_holding:
                    yield worker


def nodes_with_room(nodes: Sequence[Node], count: int) -> Iterator[Node]:
    """Yield up to `count` times the node with room for the most workers; the caller adds a worker to each."""
    for _ in range(count):
        node = max(nodes, key=lambda node: node.worker_slots - len(node.workers), default=None)
        if node is None or len(node.workers) >= node.worker_slots:
            return
        yield node
