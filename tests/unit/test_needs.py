"""One pool of cores, GPUs and memory a node: who gets what, and in which order."""

from __future__ import annotations

import re

import msgspec
import pytest

from rhapsody_mcp.engine.messages import Devices, StartTask
from rhapsody_mcp.model.specs import Layout, Needs, RankGroup, Template
from rhapsody_mcp.model.states import Cause, TaskState
from tests.unit.dispatching import DONE, Notes, Scene, finished, function, job, needing

pytestmark = pytest.mark.anyio


def devices(agent: Notes) -> dict[str, tuple[Devices, ...]]:
    return {message.task_run.spec.uid: message.devices for message in agent.messages if isinstance(message, StartTask)}


async def test_functions_and_processes_share_the_cores_in_the_order_of_submission() -> None:
    scene = Scene()
    node, agent = scene.node("one", 2)
    first, second = scene.worker("1"), scene.worker("2")
    scene.submit(function("a"), job("b", 1), function("c"), job("d", 1))
    assert (first.uids, second.uids, agent.uids) == (["a"], [], ["b"])
    scene.dispatcher.task_ended(node, "b", DONE)
    assert (first.uids, second.uids, agent.uids) == (["a"], ["c"], ["b"])
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    assert agent.uids == ["b", "d"]
    assert node.pool.free_cores == 0


async def test_more_workers_than_cores_take_parts_of_cores() -> None:
    scene = Scene()
    node, agent = scene.node("one", 2, worker_slots=4)
    workers = [scene.worker(name) for name in "1234"]
    scene.submit(*map(function, "abcd"))
    assert [worker.uids for worker in workers] == [["a"], ["b"], ["c"], ["d"]]
    assert node.pool.free_cores == 0
    scene.submit(job("e", 1))
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    assert not agent.uids
    scene.dispatcher.function_finished("2", finished("b", seconds=1.0))
    assert agent.uids == ["e"]


async def test_small_tasks_fill_the_holes_that_a_large_one_leaves_until_it_has_waited_long() -> None:
    scene = Scene()
    node, agent = scene.node("one", 4)
    scene.submit(job("a", 2), job("large", 4), job("b", 1), job("c", 3), job("d", 1))
    assert agent.uids == ["a", "b", "d"]

    patient = Scene(patience_s=0)
    node, agent = patient.node("one", 4)
    patient.submit(job("a", 2), job("large", 4), job("b", 1))
    assert agent.uids == ["a"], "the node is held"
    patient.dispatcher.task_ended(node, "a", DONE)
    patient.dispatcher.task_ended(node, "large", DONE)
    assert agent.uids == ["a", "large", "b"]


async def test_functions_do_not_starve_a_large_job_and_go_on_after_it() -> None:
    scene = Scene(patience_s=0)
    node, agent = scene.node("one", 2)
    first, second = scene.worker("1"), scene.worker("2")
    scene.submit(function("a"), function("b"), job("large", 2), *map(function, "cdefg"))
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    assert first.uids == ["a"] and not agent.uids
    scene.dispatcher.function_finished("2", finished("b", seconds=1.0))
    assert agent.uids == ["large"] and second.uids == ["b"]
    scene.dispatcher.task_ended(node, "large", DONE)
    assert (first.uids, second.uids) == (["a", "c"], ["b", "d"])


async def test_a_hold_ends_with_the_task_that_it_is_for() -> None:
    scene = Scene(patience_s=0)
    _node, agent = scene.node("one", 2)
    worker = scene.worker("1")
    scene.submit(job("a", 1), job("large", 2))
    scene.submit(function("f"))
    assert agent.uids == ["a"] and not worker.uids, "the node is held"
    scene.dispatcher.stop(["large"], Cause.CANCELED)
    assert worker.uids == ["f"]


async def test_a_task_that_waits_for_a_gpu_leaves_the_cores_to_others_and_gets_both_in_the_end() -> None:
    scene = Scene(patience_s=0)
    node, agent = scene.node("one", 3, gpus=2)
    worker = scene.worker("1")
    scene.submit(needing("train", Needs(1, 1)), needing("large", Needs(2, 2)), needing("small", Needs(1, 1)))
    scene.submit(job("plain", 1), function("f"))
    assert (agent.uids, worker.uids) == (["train", "plain"], ["f"]), "the other GPU is kept"
    scene.submit(job("next", 1))
    scene.dispatcher.task_ended(node, "train", DONE)
    assert agent.uids == ["train", "plain"], "only cores are missing now"
    scene.dispatcher.task_ended(node, "plain", DONE)
    assert agent.uids == ["train", "plain", "large"]
    scene.dispatcher.task_ended(node, "large", DONE)
    assert agent.uids[3:] == ["small", "next"]


async def test_a_hole_is_filled_from_behind_a_thousand_tasks_for_which_there_is_no_room() -> None:
    scene = Scene()
    _node, agent = scene.node("one", 4, gpus=1)
    scene.submit(*(needing(f"train{number}", Needs(1, 1)) for number in range(1000)), job("plain", 1))
    assert agent.uids == ["train0", "plain"]


async def test_a_job_with_more_ranks_than_cores_does_not_overtake_onto_one_idle_node() -> None:
    scene = Scene()
    _, first = scene.node("one", 4)
    _, second = scene.node("two", 4)
    scene.submit(job("a", 4), job("large", 8), job("oversubscribed", 9), job("b", 3))
    assert first.uids + second.uids == ["a", "b"]


async def test_whole_cores_and_gpus_are_given_out_by_number_and_are_free_again() -> None:
    scene = Scene()
    node, agent = scene.node("one", 4, gpus=2, cpus=(0, 2, 4, 6))
    scene.submit(needing("a", Needs(2.0, 1)), needing("b", Needs(None, 1)), needing("c", Needs(1, 1)))
    assert devices(agent) == {"a": (Devices((0, 2), (0,)),), "b": (Devices((), (1,)),)}
    scene.dispatcher.task_ended(node, "a", DONE)
    assert devices(agent)["c"] == (Devices((0,), (0,)),)


async def test_each_rank_gets_what_it_needs_and_a_part_of_a_core_is_bound_to_none() -> None:
    scene = Scene()
    node, agent = scene.node("one", 4, cpus=(0, 1, 2, 3))
    scene.submit(needing("a", Needs(2), ranks=2))
    assert devices(agent)["a"] == (Devices((0, 1)), Devices((2, 3)))
    scene.dispatcher.task_ended(node, "a", DONE)
    scene.submit(*(needing(f"part{number}", Needs(0.5)) for number in range(9)))
    assert len(agent.uids) == 9 and devices(agent)["part0"] == ()


async def test_memory_is_counted_where_tasks_say_how_much_they_need() -> None:
    scene = Scene()
    node, agent = scene.node("one", 8, memory_gib=10.0)
    scene.submit(*(needing(f"m{number}", Needs(memory_gb=4)) for number in range(3)), job("plain", 1))
    assert agent.uids == ["m0", "m1", "plain"]
    scene.dispatcher.task_ended(node, "m0", DONE)
    assert agent.uids == ["m0", "m1", "plain", "m2"]


@pytest.mark.parametrize(
    ("needs", "ranks", "text"),
    [
        (Needs(4), 1, "it needs 4 cores, and this engine has one with 2 cores, 1 GPU and 10.7 GB of memory; ask for"),
        (Needs(1, 2), 1, "it needs 1 core and 2 GPUs, and"),
        (Needs(memory_gb=64), 1, "it needs 1 core and 64 GB of memory, and"),
        (Needs(1), 3, "it needs 3 ranks of 1 core each, and .*; valid is up to 2 such ranks"),
    ],
)
async def test_more_than_there_is_is_refused_with_what_there_is(needs: Needs, ranks: int, text: str) -> None:
    scene = Scene()
    scene.node("one", 2, gpus=1, memory_gib=10.0)
    scene.submit(needing("a", needs, ranks))
    outcome = scene.outcomes["a"]
    assert (outcome.state, outcome.cause) == (TaskState.FAILED, Cause.INVALID)
    assert re.match(text, outcome.error), outcome.error


async def test_a_queue_that_was_emptied_from_its_middle_takes_tasks_again() -> None:
    scene = Scene()
    node, agent = scene.node("one", 2)
    scene.submit(job("a", 2), job("large", 2), job("b", 1))
    scene.dispatcher.task_ended(node, "a", DONE)
    scene.dispatcher.task_ended(node, "large", DONE)
    scene.dispatcher.task_ended(node, "b", DONE)
    scene.submit(job("c", 1))
    assert agent.uids == ["a", "large", "b", "c"] and not scene.dispatcher.processes.queue


async def test_ranks_that_are_pinned_to_a_node_with_too_little_are_refused() -> None:
    scene = Scene()
    scene.node("one", 4, gpus=1)
    scene.node("two", 4, gpus=4)
    group = RankGroup(2, Template(host_name="one"))
    run = job("a", 2)
    layout = Layout("job", (group,), needs=Needs(1, 1))
    scene.submit(msgspec.structs.replace(run, spec=msgspec.structs.replace(run.spec, layout=layout)))
    outcome = scene.outcomes["a"]
    assert outcome.cause is Cause.INVALID
    assert "host_name puts 2 ranks of 1 core and 1 GPU each on one with 4 cores" in outcome.error
    assert "valid is up to 1 such ranks there" in outcome.error
