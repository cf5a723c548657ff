"""The backend's records of a running engine: nodes, their workers, and the tasks that have not ended."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Collection, Mapping
from typing import Protocol

from rhapsody_mcp.backends.base import Report
from rhapsody_mcp.backends.compute.node_pool import NodePool
from rhapsody_mcp.engine.messages import Devices, WorkerExited
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Call, Needs, TaskRun
from rhapsody_mcp.model.states import Cause

__all__ = ["Channel", "Hold", "InFlightTask", "Node", "Placement", "Worker"]


class Channel(Protocol):
    """Sends messages to one process of the engine."""

    def send(self, *messages: object) -> None: ...

    def close(self) -> None: ...


class Hold(enum.Enum):
    """What of a node is kept for a task that waits: its GPUs and the memory that tasks ask for, or all of it."""

    NOTHING, DEVICES, ALL = range(3)


class Node:
    """A node with its hardware, its workers and its processes. Up to `worker_slots` functions run on it at a time; the
    default is one a core.

    `agent` is the channel to the node agent; None once the agent is gone.
    """

    def __init__(
        self,
        name: str,
        cores: int,
        *,
        worker_slots: int | None = None,
        agent: Channel | None = None,
        gpus: int = 0,
        memory_gib: float | None = None,
        cpus: tuple[int, ...] = (),
    ) -> None:
        self.name, self.cores, self.agent = name, cores, agent
        self.worker_slots = cores if worker_slots is None else worker_slots
        self.names = (name,)
        """The name, as the `nodes` of a task."""
        self.gpus, self.memory_gib = gpus, memory_gib
        memory_bytes = None if memory_gib is None else memory_gib * 1024**3
        self.pool = NodePool(cores, self.worker_slots, gpus=gpus, memory_bytes=memory_bytes, cpus=cpus)
        self.hold = Hold.NOTHING
        self.workers: dict[str, Worker] = {}
        self.process_tasks: dict[str, InFlightTask] = {}
        """By uid, the programs and jobs that hold cores of this node, in the order in which they got them."""
        self.parked: list[tuple[int, Worker]] = []
        """A heap of idle workers, by number, for which no core was free."""

    @property
    def memory_gb(self) -> float | None:
        return None if self.memory_gib is None else round(self.memory_gib * 1.073741824, 1)

    @property
    def takes_worker(self) -> bool:
        """Whether an idle worker of the node may get functions now."""
        return self.hold is not Hold.ALL and self.pool.has_room_for_worker

    def admits(self, needs: Needs) -> bool:
        """Whether the node is not held against a task with these needs."""
        if self.hold is Hold.DEVICES:
            return not needs.gpus and needs.memory_gb is None
        return self.hold is Hold.NOTHING

    def take(self, task: InFlightTask, ranks: int) -> tuple[Devices, ...]:
        """Give these ranks of the task what they need, and return the devices of each."""
        self.process_tasks[task.uid] = task
        return self.pool.take(task.uid, task.task_run.spec.layout, ranks)

    def give_back(self, task: InFlightTask) -> None:
        """Undo `take`."""
        del self.process_tasks[task.uid]
        self.pool.give_back(task.uid)

    def send(self, message: object) -> None:
        """Send a message to the node agent; does nothing where the agent is gone."""
        if self.agent is not None:
            self.agent.send(message)


class Worker:
    """A worker process. Functions go through `function_channel`, interrupts through `control_channel`; each is None
    until the worker has connected."""

    def __init__(self, number: int, node: Node, window: int) -> None:
        self.number, self.name, self.node = number, str(number), node
        self.function_channel: Channel | None = None
        self.control_channel: Channel | None = None
        self.assigned: dict[str, InFlightTask] = {}
        """The tasks of the worker by uid: first the running task, then the tasks that wait to be sent or to run."""
        self.recalled: set[str] = set()
        """The uids of the tasks that the worker was asked to give back."""
        self.newest_started: InFlightTask | None = None
        """The task that has started last, until its start is reported."""
        self.window = window
        """How many functions the worker may have at a time."""
        self.exit: WorkerExited | None = None
        self.has_core = False
        """Whether the worker counts in the pool of its node, because it has functions."""
        self.is_listed = False
        """Whether the worker is in the pool's list of workers that may be idle."""

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes functions now."""
        return self.function_channel is not None and self.exit is None

    @property
    def is_idle(self) -> bool:
        """Whether the worker takes functions now and has none."""
        return not self.assigned and self.is_ready


class Placement:
    """The nodes that a program or a job got: `ranks` holds the ranks of each node, the node of rank 0 first."""

    def __init__(self, ranks: Mapping[Node, tuple[int, ...]]) -> None:
        self.ranks = ranks
        self.devices: dict[Node, tuple[Devices, ...]] = {}
        """The devices of the ranks of each node, in order, where the task asked for devices."""
        self.outcomes: dict[Node, Outcome] = {}
        """The outcome of each node's ranks, once all of these have ended."""
        self.scripts: dict[int, tuple[Node, str]] = {}
        """The node and the shell script of each rank that a step of the scheduler will start, by rank."""
        self.failed_first: Node | None = None
        """The node whose failure ended the ranks of the other nodes."""

    @property
    def running(self) -> list[Node]:
        """The nodes whose ranks have not ended."""
        return [node for node in self.ranks if node not in self.outcomes]


class InFlightTask:
    """A task that has not ended. A task waits in a queue, and then has a `worker`, or slots in its `placement`."""

    __slots__ = (
        *("is_sent", "nodes", "number", "permission", "permission_asked", "placement", "printed", "priority"),
        *("rank_that_tells", "report", "runs_in_worker", "shape", "started", "stop_cause", "task_run", "timer", "uid"),
        "worker",
    )

    def __init__(self, task_run: TaskRun, report: Report, number: int = 0) -> None:
        """Tasks with a lower `number` were submitted before."""
        self.task_run, self.report, self.number = task_run, report, number
        spec = task_run.spec
        self.uid, self.priority = spec.uid, spec.priority
        self.runs_in_worker = spec.layout.mode == "native"
        self.worker: Worker | None = None
        self.placement: Placement | None = None
        self.is_sent = False
        """Whether the worker, or the node agents, have been asked to run the task."""
        self.nodes: tuple[str, ...] = ()
        """The names of the nodes that have been asked to run the task, the node of rank 0 first."""
        self.permission: asyncio.Future[bool] | None = None
        """The answer of `before_start` for this task, asked for at `permission_asked` (the loop's time)."""
        self.permission_asked = 0.0
        self.started: float | None = None
        self.stop_cause: Cause | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.shape: tuple[object, ...] | None = None
        """See `shape_of`; None until somebody has asked."""

    @property
    def size(self) -> int:
        """The size of the function and its arguments, in bytes; 0 for a program."""
        work = self.task_run.spec.work
        return len(work.code) + len(work.arguments) if isinstance(work, Call) else 0

    @property
    def worker_number(self) -> int | None:
        return None if self.worker is None else self.worker.number

    printed: tuple[RankOutcome, ...]
    """What its ranks had printed; set once its engine is lost."""
    rank_that_tells: int
    """The first rank that has told its progress, which stands for that of the task; set once one has."""

    def comes_before(self, other: InFlightTask) -> bool:
        """Whether this task is to start before the other, where both could."""
        return (-self.priority, self.number) < (-other.priority, other.number)

    def place_of(self, rank: int) -> tuple[Node | None, str]:
        """The node on which the rank runs, and the name of the worker where one runs the task now; None where the rank
        has not started."""
        if (worker := self.worker) is not None:
            is_running = self.is_sent and next(iter(worker.assigned), None) == self.uid
            return (worker.node if is_running else None), worker.name
        ranks = self.placement.ranks.items() if self.placement is not None else ()
        return next((node for node, own in ranks if rank in own), None), ""

    def take_back(self) -> None:
        """Note that the task is assigned to no worker and no node any more."""
        self.worker, self.placement, self.is_sent, self.nodes = None, None, False, ()

    def has_started(self, noted: Collection[tuple[str, int]]) -> bool:
        """Whether the task has started, by its worker's message or by `noted`, pairs of a uid and an attempt."""
        return self.started is not None or (self.uid, self.task_run.attempt) in noted
