"""Of the tasks that wait for a place, those of the highest priority start first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from rhapsody_mcp.backends.base import Running
from rhapsody_mcp.backends.priority_queue import PriorityQueue
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.states import Cause
from tests.unit.dispatching import DONE, Scene, finished, function, job

pytestmark = pytest.mark.anyio


def urgent(run: TaskRun, priority: int = 5) -> TaskRun:
    return replace(run, spec=replace(run.spec, priority=priority))


def items(*pairs: tuple[str, int]) -> list[Any]:
    return [SimpleNamespace(name=name, priority=priority) for name, priority in pairs]


def drained(queue: PriorityQueue[Any]) -> str:
    return "".join(queue.popleft().name for _ in range(len(queue)))


def queue_of(*pairs: tuple[str, int]) -> PriorityQueue[Any]:
    queue: PriorityQueue[Any] = PriorityQueue()
    queue.extend(items(*pairs))
    return queue


def test_a_queue_gives_the_highest_priority_first_and_then_the_oldest() -> None:
    queue = queue_of(("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5))
    assert [item.name for item in queue] == list("beacd")
    assert [queue[index].name for index in range(len(queue))] == list("beacd")
    assert drained(queue) == "beacd"
    assert not queue and len(queue) == 0
    with pytest.raises(IndexError):
        queue.popleft()
    queue.extend(items(("a", 1), ("b", 0)))
    queue.appendleft(items(("c", 0))[0])
    assert drained(queue) == "acb"


def test_items_are_taken_out_and_moved_to_the_end_of_another_priority() -> None:
    queue = queue_of(("a", 0), ("b", 0), ("c", 5), ("d", 0))
    assert [item.name for item in queue.take(lambda item: item.name == "b")] == ["b"]
    queue.move(lambda item: item.name == "d", lambda _: 5)
    queue.move(lambda item: item.name == "c", lambda _: 0)
    assert drained(queue) == "dac"
    queue.extend(items(("a", 0)))
    queue.clear()
    assert not queue


async def test_functions_go_to_workers_by_priority() -> None:
    scene = Scene()
    scene.node("one", 1)
    scene.submit(function("a"), function("b"), urgent(function("c")), urgent(function("d"), -1), function("e"))
    worker = scene.worker("1")
    for uid in "cabe":
        scene.dispatcher.function_finished("1", finished(uid, seconds=1.0))
    assert worker.uids == list("cabed")


async def test_programs_and_jobs_get_slots_by_priority() -> None:
    scene = Scene()
    node, agent = scene.node("one", 1)
    scene.submit(job("a", 1), job("b", 1), urgent(job("c", 1)))
    scene.dispatcher.prioritize({"b": 9, "unknown": 1})
    for uid in "cb":
        scene.dispatcher.task_ended(node, uid, DONE)
    assert agent.uids == ["c", "b", "a"]


async def test_another_priority_changes_the_order_of_what_waits_and_canceled_tasks_leave() -> None:
    scene = Scene()
    scene.node("one", 1)
    worker = scene.worker("1")
    scene.submit(*map(function, "abcd"))
    scene.dispatcher.prioritize({"d": 1, "a": 7})
    scene.dispatcher.stop(["c"], Cause.CANCELED)
    for uid in "ad":
        scene.dispatcher.function_finished("1", finished(uid, seconds=1.0))
    assert worker.uids == ["a", "d", "b"]


async def test_with_several_nodes_a_start_tells_its_node() -> None:
    scene = Scene(expected_nodes=2)
    scene.node("one", 1)
    scene.node("two", 1)
    scene.submit(job("a", 2))
    scene.dispatcher.task_started("a", 1.0)
    assert scene.events == [Running("a", 1.0, ("one", "two"))]
