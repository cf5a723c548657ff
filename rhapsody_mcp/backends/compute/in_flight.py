"""The backend's records of a running engine: nodes, their workers, and the tasks that have not ended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

from rhapsody_mcp.backends.base import Report
from rhapsody_mcp.engine.messages import WorkerExited
from rhapsody_mcp.model.specs import Call, TaskRun
from rhapsody_mcp.model.states import Cause

__all__ = ["Channel", "InFlightTask", "Node", "Worker"]


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
        self.cores, self.gpus, self.memory_gib = cores, gpus, memory_gib
        self.workers: dict[str, Worker] = {}
        self.used_slots = 0

    def slots_for(self, task: InFlightTask) -> int:
        """The slots that a task takes on this node; a job with more ranks than the node has slots takes all slots."""
        return min(task.slots, self.slots)

    def has_room_for(self, task: InFlightTask) -> bool:
        return self.agent is not None and self.used_slots + self.slots_for(task) <= self.slots

    @property
    def free_slots(self) -> int:
        return self.slots - self.used_slots

    def send(self, message: object) -> None:
        """Send a message to the node agent; does nothing where the agent is gone."""
        if self.agent is not None:
            self.agent.send(message)


class Worker:
    """A worker process. Functions go through `function_channel`, interrupts through `control_channel`; each is None
    until the worker has connected."""

    def __init__(self, name: str, node: Node, window: int) -> None:
        self.name, self.node = name, node
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

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes functions now."""
        return self.function_channel is not None and self.exit is None


class InFlightTask:
    """A task that has not ended. A task waits in a queue, and then has a `worker`, or slots of a `node`."""

    __slots__ = (
        *("is_sent", "node", "permission", "permission_asked", "report", "runs_in_worker", "started", "stop_cause"),
        *("task_run", "timer", "uid", "worker"),
    )

    def __init__(self, task_run: TaskRun, report: Report) -> None:
        self.task_run, self.report = task_run, report
        self.uid = task_run.spec.uid
        self.runs_in_worker = task_run.spec.layout.mode == "native"
        self.worker: Worker | None = None
        self.node: Node | None = None
        self.is_sent = False
        """Whether the worker, or the node agent, has been asked to run the task."""
        self.permission: asyncio.Future[bool] | None = None
        """The answer of `before_start` for this task, asked for at `permission_asked` (the loop's time)."""
        self.permission_asked = 0.0
        self.started: float | None = None
        self.stop_cause: Cause | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """The size of the function and its arguments, in bytes; 0 for a program."""
        work = self.task_run.spec.work
        return len(work.code) + len(work.arguments) if isinstance(work, Call) else 0

    @property
    def slots(self) -> int:
        return max(1, self.task_run.spec.layout.ranks)

    def has_started(self, noted: Collection[tuple[str, int]]) -> bool:
        """Whether the task has started, by its worker's message or by `noted`, pairs of a uid and an attempt."""
        return self.started is not None or (self.uid, self.task_run.attempt) in noted
