"""Which worker, and which node, gets which task: the dispatcher with nodes and workers that only take notes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rhapsody_mcp.backends.base import Ended, Event, Returned
from rhapsody_mcp.backends.compute.dispatcher import Dispatcher
from rhapsody_mcp.backends.compute.in_flight import InFlightTask, Node
from rhapsody_mcp.engine.messages import (
    CancelTask,
    FunctionFinished,
    FunctionResult,
    Interrupt,
    RunFunction,
    StartTask,
    StartWorker,
    WorkerExited,
)
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Command, Layout, RankGroup, TaskRun, TaskSpec, Template
from rhapsody_mcp.model.states import Cause, TaskState

pytestmark = pytest.mark.anyio
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

    def __init__(self, *, bundles: bool = False) -> None:
        self.events: list[Event] = []
        self.exits: list[tuple[Sequence[InFlightTask], WorkerExited]] = []
        self.dispatcher = Dispatcher(on_exit=lambda tasks, exited: self.exits.append((tasks, exited)), bundles=bundles)

    def node(self, name: str, slots: int) -> tuple[Node, Notes]:
        agent = Notes()
        node = Node(name, slots, agent=agent)
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
    def states(self) -> dict[str, TaskState]:
        return {event.uid: event.outcome.state for event in self.events if isinstance(event, Ended)}


def function(uid: str) -> TaskRun:
    spec = TaskSpec(uid=uid, work=Call("module", b"a:b"), layout=Layout("native"))
    return TaskRun(spec=spec, bindings={}, results_folder="/")


def job(uid: str, ranks: int) -> TaskRun:
    layout = Layout("job", groups=(RankGroup(ranks, Template()),))
    return TaskRun(spec=TaskSpec(uid=uid, work=Command("true"), layout=layout), bindings={}, results_folder="/")


def finished(uid: str, seconds: float) -> FunctionFinished:
    return FunctionFinished(uid, 0.0, seconds, FunctionResult())


async def test_each_node_is_asked_for_a_worker_a_slot() -> None:
    scene = Scene()
    _, first = scene.node("one", 2)
    _, second = scene.node("two", 1)
    assert (first.messages, second.messages) == ([StartWorker("1"), StartWorker("2")], [StartWorker("3")])


async def test_functions_wait_for_a_worker_and_a_slow_worker_gets_one_at_a_time() -> None:
    scene = Scene()
    scene.node("one", 1)
    scene.submit(function("a"), function("b"))
    worker = scene.worker("1")
    assert worker.uids == ["a"]
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    assert worker.uids == ["a", "b"]
    assert scene.states == {"a": TaskState.DONE}


async def test_a_quick_worker_gets_more_at_a_time() -> None:
    scene = Scene()
    scene.node("one", 1)
    scene.submit(*map(function, "abcdef"))
    worker = scene.worker("1")
    scene.dispatcher.function_finished("1", finished("a", seconds=0.001))
    assert worker.uids == ["a", "b", "c"]


async def test_a_job_goes_to_the_node_with_the_most_free_slots() -> None:
    scene = Scene()
    one, first = scene.node("one", 2)
    two, second = scene.node("two", 4)
    scene.submit(job("a", 3), job("b", 2), job("c", 1))
    assert (first.uids, second.uids) == (["b"], ["a", "c"])
    assert (one.free_slots, two.free_slots) == (0, 0)


async def test_a_job_larger_than_a_node_takes_all_of_one_and_others_wait_behind_it() -> None:
    scene = Scene()
    node, agent = scene.node("one", 2)
    scene.submit(job("a", 1), job("b", 8), job("c", 1))
    assert agent.uids == ["a"]
    scene.dispatcher.task_ended("a", DONE)
    assert (agent.uids, node.free_slots) == (["a", "b"], 0)
    scene.dispatcher.task_ended("b", DONE)
    assert agent.uids == ["a", "b", "c"]


async def test_a_task_is_canceled_where_it_is() -> None:
    scene = Scene()
    _, agent = scene.node("one", 1)
    worker = scene.worker("1")
    scene.submit(function("runs"), function("waits"), job("job", 1), job("queued", 1))
    scene.dispatcher.stop(["runs", "waits", "job", "queued"], Cause.CANCELED)
    assert scene.states == {"waits": TaskState.CANCELED, "queued": TaskState.CANCELED}
    assert worker.messages[-1] == Interrupt("runs")
    assert agent.messages[-1] == CancelTask("job")


async def test_an_idle_worker_has_others_give_back_what_they_have_not_started() -> None:
    scene = Scene()
    scene.node("one", 2)
    first = scene.worker("1")
    scene.submit(*map(function, "abcde"))
    scene.dispatcher.function_finished("1", finished("a", seconds=0.001))
    assert first.uids == ["a", "b", "c"]
    second = scene.worker("2")
    for uid in "de":
        scene.dispatcher.function_finished("2", finished(uid, seconds=0.001))
    assert first.messages[-1] == Interrupt("c", running=False)
    scene.dispatcher.task_revoked("c")
    assert second.uids == ["d", "e", "c"]


async def test_a_worker_that_exits_is_replaced_on_its_node_and_its_tasks_are_handed_over() -> None:
    scene = Scene()
    _, first = scene.node("one", 1)
    _, second = scene.node("two", 1)
    worker = scene.worker("2")
    scene.submit(function("a"))
    scene.dispatcher.worker_exited(exited := WorkerExited("2", -9))
    assert not scene.exits  # there may be more to receive
    scene.dispatcher.worker_disconnected("2", worker)
    ((tasks, message),) = scene.exits
    assert ([task.uid for task in tasks], message) == (["a"], exited)
    assert (len(first.messages), second.messages[-1]) == (1, StartWorker("3"))
    scene.dispatcher.requeue(tasks)
    assert scene.worker("3").uids == ["a"]


async def test_a_task_of_a_worker_that_exits_is_not_run_again_once_it_was_canceled() -> None:
    scene = Scene()
    scene.node("one", 1)
    worker = scene.worker("1")
    scene.submit(function("a"))
    scene.dispatcher.worker_disconnected("1", worker)
    scene.dispatcher.worker_exited(WorkerExited("1", 1))
    scene.dispatcher.stop(["a"], Cause.CANCELED)
    scene.dispatcher.requeue(scene.exits[0][0])
    assert scene.states == {"a": TaskState.CANCELED}


async def test_an_end_that_comes_after_the_exit_of_its_worker_counts() -> None:
    scene = Scene()
    scene.node("one", 1)
    worker = scene.worker("1")
    scene.submit(function("a"))
    scene.dispatcher.worker_disconnected("1", worker)
    scene.dispatcher.worker_exited(WorkerExited("1", 0))
    assert not scene.dispatcher.worker_ready("1", Notes())
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    assert scene.states == {"a": TaskState.DONE}


async def test_an_engine_that_ends_loses_what_had_started_and_returns_the_rest() -> None:
    scene = Scene()
    scene.node("one", 1)
    scene.worker("1")
    scene.submit(function("a"), function("b"), function("c"))
    scene.dispatcher.task_started("a", 1.0)
    scene.dispatcher.stop(["c"], Cause.CANCELED)
    scene.dispatcher.halt()
    scene.dispatcher.abandon("it is gone", noted_starts=set())
    assert scene.states == {"c": TaskState.CANCELED, "a": TaskState.FAILED}
    assert scene.events[-1] == Returned("b", "it is gone")


async def test_with_bundles_a_worker_is_started_for_each_and_let_go_after_it() -> None:
    scene = Scene(bundles=True)
    _, agent = scene.node("one", 2)
    scene.submit(*(function(str(number)) for number in range(65)))
    assert agent.messages == [StartWorker("1"), StartWorker("2")]
    worker = scene.worker("2")
    for uid in list(worker.uids):
        scene.dispatcher.function_finished("2", finished(uid, seconds=0.001))
    assert worker.is_closed
