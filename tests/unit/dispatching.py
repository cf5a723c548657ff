"""A dispatcher with nodes and workers that only take notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rhapsody_mcp.backends.base import BeforeStart, Ended, Event, Running
from rhapsody_mcp.backends.compute.dispatcher import Dispatcher
from rhapsody_mcp.backends.compute.in_flight import InFlightTask, Node
from rhapsody_mcp.engine.messages import FunctionFinished, FunctionResult, RunFunction, StartTask, WorkerExited
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Command, Layout, Needs, RankGroup, TaskRun, TaskSpec, Template
from rhapsody_mcp.model.states import TaskState

__all__ = ["DONE", "Notes", "Scene", "finished", "function", "job", "needing", "process_on", "task_run"]

DONE = Outcome(state=TaskState.DONE, ended=1.0)


class Notes:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.is_closed = False

    def send(self, *messages: object) -> None:
        self.messages.extend(messages)

    def close(self) -> None:
        self.is_closed = True

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The ranks that it was asked to start, by task."""
        return {message.task_run.spec.uid: message.ranks for message in self.messages if isinstance(message, StartTask)}

    @property
    def uids(self) -> list[str]:
        """The tasks that it was sent, in order."""
        starts = (
            message.task_run.spec.uid if isinstance(message, StartTask) else message.uid
            for message in self.messages
            if isinstance(message, StartTask | RunFunction)
        )
        return list(starts)


class Scene:
    """A dispatcher, and the events that it reports."""

    def __init__(
        self,
        *,
        bundles: bool = False,
        expected_nodes: int = 1,
        before_start: BeforeStart | None = None,
        patience_s: float = 3600.0,
    ) -> None:
        self.events: list[Event] = []
        self.exits: list[tuple[Sequence[InFlightTask], WorkerExited]] = []
        self.dispatcher = Dispatcher(
            on_exit=lambda tasks, exited: self.exits.append((tasks, exited)),
            before_start=before_start,
            bundles=bundles,
            expected_nodes=expected_nodes,
        )
        self.dispatcher.processes.patience_s = patience_s

    def node(self, name: str, cores: int, **hardware: Any) -> tuple[Node, Notes]:
        agent = Notes()
        node = Node(name, cores, agent=agent, **hardware)
        self.dispatcher.add_node(node)
        return node, agent

    def worker(self, name: str) -> Notes:
        """A worker that is ready; its interrupts go through the same channel as its functions."""
        channel = Notes()
        self.dispatcher.worker_listening(name, channel)
        assert self.dispatcher.worker_ready(name, channel)
        return channel

    def submit(self, *task_runs: TaskRun) -> None:
        self.dispatcher.submit(task_runs, self.events.append)

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return {event.uid: event.outcome for event in self.events if isinstance(event, Ended)}

    @property
    def states(self) -> dict[str, TaskState]:
        return {uid: outcome.state for uid, outcome in self.outcomes.items()}

    @property
    def starts(self) -> list[str]:
        """The tasks that were reported as running."""
        return [event.uid for event in self.events if isinstance(event, Running)]


def function(uid: str) -> TaskRun:
    spec = TaskSpec(uid=uid, work=Call("module", b"a:b"), layout=Layout("native"))
    return TaskRun(spec=spec, bindings={}, results_folder="/")


def task_run(uid: str, layout: Layout, timeout_s: float | None = None) -> TaskRun:
    spec = TaskSpec(uid=uid, work=Command("true"), layout=layout, timeout_s=timeout_s)
    return TaskRun(spec=spec, bindings={}, results_folder="/")


def job(uid: str, ranks: int, ranks_per_node: int | None = None) -> TaskRun:
    return task_run(uid, Layout("job", (RankGroup(ranks, Template()),), ranks_per_node=ranks_per_node))


def needing(uid: str, needs: Needs, ranks: int = 1) -> TaskRun:
    """A job whose ranks each need this."""
    return task_run(uid, Layout("job", (RankGroup(ranks, Template()),), needs=needs))


def process_on(uid: str, host: str) -> TaskRun:
    return task_run(uid, Layout("process", (RankGroup(1, Template(host_name=host)),)))


def finished(uid: str, seconds: float) -> FunctionFinished:
    return FunctionFinished(uid, 0.0, seconds, FunctionResult())
