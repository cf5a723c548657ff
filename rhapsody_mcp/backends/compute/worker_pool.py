"""The workers of an engine; the idle ones are found without a look at the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush

from rhapsody_mcp.backends.compute.in_flight import Channel, Node, Worker

__all__ = ["WorkerPool"]


class WorkerPool:
    """The workers by name. Names are numbers, and unique in an engine."""

    def __init__(self) -> None:
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

    def set_ready(self, worker: Worker, functions: Channel) -> None:
        worker.function_channel = functions
        self._starting.discard(worker)
        self.note_idle(worker)

    def note_idle(self, worker: Worker) -> None:
        """The worker may have become idle; a call too many does nothing."""
        if worker.is_idle and not worker.is_listed:
            worker.is_listed = True
            heappush(self._idle, (worker.number, worker))

    def first_idle(self) -> Worker | None:
        """The idle worker that was started first."""
        while self._idle and not self._idle[0][1].is_idle:
            heappop(self._idle)[1].is_listed = False
        return self._idle[0][1] if self._idle else None

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
