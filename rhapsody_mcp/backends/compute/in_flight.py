"""The backend's records of a running engine: nodes, their workers, and the tasks that have not ended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Protocol

from rhapsody_mcp.backends.base import Report
from rhapsody_mcp.engine.messages import WorkerExited
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Call, TaskRun
from rhapsody_mcp.model.states import Cause

__all__ = ["Channel", "InFlightTask", "Node", "Placement", "Worker"]


class Channel(Protocol):
    """Sends messages to one process of the engine."""

    def send(self, *messages: object) -> None: ...

    def close(self) -> None: ...


class Node:
    """A node with its hardware. `slots` functions, and as many ranks of other tasks, can run on the node at a time.

    `agent` is the channel to the node agent; None once the agent is gone.
    """

    def __init__(
        self,
        name: str,
        slots: int,
        *,
        agent: Channel | None = None,
        cores: int = 0,
        gpus: int = 0,
        memory_gib: float | None = None,
    ) -> None:
        self.name, self.slots, self.agent = name, slots, agent
        self.names = (name,)
        """The name, as the `nodes` of a task."""
        self.cores, self.gpus, self.memory_gib = cores, gpus, memory_gib
        self.workers: dict[str, Worker] = {}
        self.process_tasks: dict[str, InFlightTask] = {}
        """By uid, the programs and jobs that hold slots of this node, in the order in which they got them."""
        self.used_slots = 0

    @property
    def free_slots(self) -> int:
        return self.slots - self.used_slots

    def reserve(self, task: InFlightTask, ranks: int) -> None:
        """Give this many ranks of the task their slots; more ranks than the node has slots share all slots."""
        self.process_tasks[task.uid] = task
        self.used_slots += min(ranks, self.slots)

    def release(self, task: InFlightTask, ranks: int) -> None:
        """Take back the slots of `reserve`."""
        del self.process_tasks[task.uid]
        self.used_slots -= min(ranks, self.slots)

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
        *("is_sent", "nodes", "permission", "permission_asked", "placement", "printed", "priority"),
        *("rank_that_tells", "report", "runs_in_worker", "started", "stop_cause", "task_run", "timer", "uid", "worker"),
    )

    def __init__(self, task_run: TaskRun, report: Report) -> None:
        self.task_run, self.report = task_run, report
        self.uid, self.priority = task_run.spec.uid, task_run.spec.priority
        self.runs_in_worker = task_run.spec.layout.mode == "native"
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
        self.printed: tuple[RankOutcome, ...] = ()
        """What its ranks had printed, once its engine is lost."""
        self.rank_that_tells: int | None = None
        """The first rank that has told its progress, which stands for that of the task."""

    @property
    def size(self) -> int:
        """The size of the function and its arguments, in bytes; 0 for a program."""
        work = self.task_run.spec.work
        return len(work.code) + len(work.arguments) if isinstance(work, Call) else 0

    def take_back(self) -> None:
        """Note that the task is assigned to no worker and no node any more."""
        self.worker, self.placement, self.is_sent, self.nodes = None, None, False, ()

    def has_started(self, noted: Collection[tuple[str, int]]) -> bool:
        """Whether the task has started, by its worker's message or by `noted`, pairs of a uid and an attempt."""
        return self.started is not None or (self.uid, self.task_run.attempt) in noted
