"""Which worker, and which node, gets which task: the dispatcher with nodes and workers that only take notes."""

from __future__ import annotations

import signal

import anyio
import pytest

from rhapsody_mcp.backends.base import Event, Returned, Running
from rhapsody_mcp.backends.compute import start_gate
from rhapsody_mcp.engine.messages import CancelTask, Interrupt, StartWorker, WorkerExited
from rhapsody_mcp.model.states import Cause, TaskState
from tests.unit.dispatching import DONE, Notes, Scene, finished, function, job

pytestmark = pytest.mark.anyio


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
    assert (one.pool.free_cores, two.pool.free_cores) == (0, 0)


async def test_a_job_larger_than_a_node_takes_all_of_one_and_others_wait_behind_it() -> None:
    scene = Scene(patience_s=0)
    node, agent = scene.node("one", 2)
    scene.submit(job("a", 1), job("b", 8), job("c", 1))
    assert agent.uids == ["a"]
    scene.dispatcher.task_ended(node, "a", DONE)
    assert (agent.uids, node.pool.free_cores) == (["a", "b"], 0)
    scene.dispatcher.task_ended(node, "b", DONE)
    assert agent.uids == ["a", "b", "c"]


async def test_a_task_is_canceled_where_it_is() -> None:
    scene = Scene()
    _, agent = scene.node("one", 2, worker_slots=1)
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


async def test_of_the_idle_workers_the_oldest_gets_the_next_function() -> None:
    scene = Scene()
    scene.node("one", 3)
    third, first, second = (scene.worker(name) for name in "312")
    scene.submit(function("a"), function("b"))
    scene.dispatcher.function_finished("2", finished("b", seconds=1.0))
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    scene.submit(function("c"))
    assert (first.uids, second.uids, third.uids) == (["a", "c"], ["b"], [])


async def test_the_start_of_a_function_is_reported_while_it_runs() -> None:
    scene = Scene()
    scene.node("one", 2)
    scene.worker("1")
    scene.worker("2")
    is_reported = anyio.Event()

    def report(event: Event) -> None:
        scene.events.append(event)
        if isinstance(event, Running):
            is_reported.set()

    scene.dispatcher.submit([function("a"), function("b")], report)
    scene.dispatcher.task_started("a", 1.0)
    scene.dispatcher.task_started("b", 1.0)
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    with anyio.fail_after(10):
        await is_reported.wait()
    assert scene.starts == ["b"]


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


def paused() -> tuple[Scene, Notes, Notes]:
    """After a SIGTERM from outside, with a node agent and a new worker."""
    scene = Scene()
    _, agent = scene.node("one", 2, worker_slots=1)
    first = scene.worker("1")
    scene.submit(function("a"))
    scene.dispatcher.worker_exited(WorkerExited("1", -signal.SIGTERM))
    scene.dispatcher.worker_disconnected("1", first)
    return scene, agent, scene.worker("2")


async def test_after_a_sigterm_from_outside_no_task_starts_for_a_moment() -> None:
    scene, agent, worker = paused()
    scene.submit(function("b"), job("c", 1))
    assert worker.uids == agent.uids == []
    with anyio.fail_after(5):
        while (worker.uids, agent.uids) != (["b"], ["c"]):  # noqa: ASYNC110 - what is sent is no event
            await anyio.sleep(0.05)


async def test_what_is_held_back_is_canceled_at_once() -> None:
    scene, _, _ = paused()
    scene.submit(function("b"), job("c", 1))
    scene.dispatcher.stop(["b", "c"], Cause.CANCELED)
    assert scene.states == {"b": TaskState.CANCELED, "c": TaskState.CANCELED}


@pytest.mark.parametrize("ending", ["drained", "lost"])
async def test_what_is_held_back_is_returned_where_the_job_ends(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_gate, "_PAUSE_S", 0.1)
    scene, agent, worker = paused()
    scene.submit(function("b"), job("c", 1))
    if ending == "drained":
        scene.dispatcher.drain("the job ends")
    else:
        scene.dispatcher.halt()
    await anyio.sleep(0.3)  # nothing happens, which is no event
    assert worker.uids == agent.uids == []
    if ending == "lost":
        scene.dispatcher.abandon("the job has ended", set())
    assert {event.uid for event in scene.events if isinstance(event, Returned)} >= {"b", "c"}
