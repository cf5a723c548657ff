"""Tasks on several nodes: jobs whose ranks are spread, and nodes that are lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec
import pytest

from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.engine.messages import CancelTask, StartTask, StartWorker
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Layout, RankGroup, Template
from rhapsody_mcp.model.states import Cause, TaskState
from tests.unit.dispatching import DONE, Notes, Scene, finished, function, job, process_on, task_run

pytestmark = pytest.mark.anyio
FAILED = msgspec.structs.replace(
    DONE,
    state=TaskState.FAILED,
    cause=Cause.EXIT_CODE,
    error="rank 3 of 4: exit code 1",
    ranks=(RankOutcome(2), RankOutcome(3, exit_code=1, cause=Cause.EXIT_CODE, error="exit code 1")),
)
CANCELED = Outcome(state=TaskState.CANCELED, ended=1.0, cause=Cause.CANCELED)


async def test_a_job_gets_all_its_cores_at_once_and_nobody_passes_it_once_it_has_waited() -> None:
    scene = Scene(patience_s=0)
    one, first = scene.node("one", 2)
    two, second = scene.node("two", 2)
    scene.submit(job("small", 1), job("large", 4), job("later", 1))
    assert (first.uids, second.uids) == (["small"], [])
    scene.dispatcher.task_ended(one, "small", DONE)
    assert (first.ranks["large"], second.ranks["large"]) == ((0, 1), (2, 3))
    scene.dispatcher.task_ended(two, "large", DONE)
    assert "large" not in scene.states and second.uids == ["large", "later"], (
        "the cores of a part are free once it ends"
    )
    scene.dispatcher.task_ended(one, "large", DONE)
    assert scene.outcomes["large"].nodes == ("one", "two")
    assert (one.pool.free_cores, two.pool.free_cores) == (2, 1)


async def test_each_node_is_told_all_nodes_and_a_task_on_one_node_has_all_its_ranks() -> None:
    scene = Scene()
    _, first = scene.node("one", 2)
    _, second = scene.node("two", 2)
    large, small = job("large", 3), job("small", 1)
    scene.submit(large, small)
    assert first.messages[-1] == StartTask(large, (0, 1), ("one", "two"))
    assert second.messages[-2:] == [StartTask(large, (2,), ("one", "two")), StartTask(small, (), ("two",))]


async def test_a_start_is_reported_once() -> None:
    scene = Scene()
    scene.node("one", 1)
    scene.node("two", 1)
    scene.submit(job("a", 2))
    scene.dispatcher.task_started("a", 1.0)
    scene.dispatcher.task_started("a", 2.0)
    assert scene.starts == ["a"]


async def test_a_cancellation_reaches_the_parts_that_run() -> None:
    scene = Scene()
    one, first = scene.node("one", 1)
    two, second = scene.node("two", 1)
    scene.submit(job("a", 2))
    scene.dispatcher.task_ended(one, "a", DONE)
    scene.dispatcher.stop(["a"], Cause.CANCELED)
    assert isinstance(first.messages[-1], StartTask) and second.messages[-1] == CancelTask("a")
    scene.dispatcher.task_ended(two, "a", CANCELED)
    assert scene.states == {"a": TaskState.CANCELED}


async def test_a_time_limit_on_one_node_ends_the_ranks_on_the_others() -> None:
    scene = Scene()
    one, _ = scene.node("one", 1)
    two, second = scene.node("two", 1)
    scene.submit(task_run("a", job("a", 2).spec.layout, timeout_s=5.0))
    late = Outcome(state=TaskState.FAILED, ended=1.0, cause=Cause.TIMEOUT, error="its time of 5.0 s was up")
    scene.dispatcher.task_ended(one, "a", late)
    assert second.messages[-1] == CancelTask("a")
    scene.dispatcher.task_ended(two, "a", CANCELED)
    assert (scene.outcomes["a"].cause, scene.outcomes["a"].error) == (Cause.TIMEOUT, "its time of 5.0 s was up")


async def test_independent_ranks_go_on_when_ranks_of_another_node_fail() -> None:
    scene = Scene()
    one, first = scene.node("one", 2)
    two, _ = scene.node("two", 2)
    scene.submit(job("a", 4))
    scene.dispatcher.task_ended(two, "a", FAILED)
    assert isinstance(first.messages[-1], StartTask)
    scene.dispatcher.task_ended(one, "a", DONE)
    assert (scene.outcomes["a"].error, scene.outcomes["a"].cause) == ("rank 3 of 4: exit code 1", Cause.EXIT_CODE)


async def test_ranks_that_cannot_start_on_a_node_end_the_others() -> None:
    scene = Scene()
    one, _ = scene.node("one", 2)
    two, second = scene.node("two", 2)
    scene.submit(job("a", 4))
    no_gpu = Outcome(state=TaskState.FAILED, ended=1.0, cause=Cause.INVALID, error="GPU 0 was asked for")
    scene.dispatcher.task_ended(one, "a", no_gpu)
    assert second.messages[-1] == CancelTask("a", failed_rank=0)
    scene.dispatcher.task_ended(two, "a", FAILED)
    assert (scene.outcomes["a"].cause, scene.outcomes["a"].error) == (Cause.INVALID, "GPU 0 was asked for")


async def test_a_task_that_no_node_can_run_is_refused_once_all_nodes_have_joined() -> None:
    scene = Scene(expected_nodes=2)
    scene.node("one", 1)
    scene.submit(process_on("second", "two"), process_on("third", "three"))
    assert not scene.events
    _, agent = scene.node("two", 1)
    assert agent.uids == ["second"]
    assert scene.outcomes["third"].cause is Cause.INVALID
    assert scene.outcomes["third"].error == "host_name 'three' is no node of this engine; it has 'one', 'two'."


async def test_a_task_is_refused_where_its_node_is_not_expected_any_more() -> None:
    scene = Scene(expected_nodes=2)
    scene.node("one", 1)
    scene.submit(process_on("a", "two"))
    assert not scene.events
    scene.dispatcher.processes.expect_nodes(1)
    assert scene.outcomes["a"].error == "host_name 'two' is no node of this engine; it has 'one'."


async def test_a_job_waits_for_nodes_that_are_expected_before_ranks_share_slots() -> None:
    scene = Scene(expected_nodes=2)
    _, first = scene.node("one", 1)
    scene.submit(job("a", 2))
    assert not first.uids
    _, second = scene.node("two", 1)
    assert (first.ranks, second.ranks) == ({"a": (0,)}, {"a": (1,)})


async def test_outcomes_name_their_nodes_where_the_engine_has_several() -> None:
    for names, nodes in ((["one"], ()), (["one", "two"], ("one",))):
        scene = Scene(expected_nodes=len(names))
        for name in names:
            scene.node(name, 1)
        scene.worker("1")
        scene.submit(function("a"))
        scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
        assert scene.outcomes["a"].nodes == nodes


async def test_a_lost_node_loses_functions_that_had_started_and_others_run_elsewhere() -> None:
    scene = Scene()
    one, _ = scene.node("one", 2)
    scene.node("two", 1)
    scene.worker("1")
    scene.worker("2")
    other = scene.worker("3")
    scene.submit(*map(function, ["told", "noted", "busy", "next"]))
    scene.dispatcher.task_started("told", 1.0)
    scene.dispatcher.lose_node(one, "one is gone", {("noted", 1)})
    assert [scene.outcomes[uid].error for uid in ("told", "noted")] == ["one is gone"] * 2
    assert {scene.outcomes[uid].cause for uid in ("told", "noted")} == {Cause.LOST}
    assert scene.outcomes["told"].nodes == ("one",)
    scene.dispatcher.function_finished("3", finished("busy", seconds=1.0))
    assert other.uids == ["busy", "next"]
    assert [node.name for node in scene.dispatcher.nodes] == ["two"]


async def test_an_end_that_comes_from_a_lost_node_after_all_counts_and_the_function_does_not_run_again() -> None:
    scene = Scene()
    one, _ = scene.node("one", 1)
    scene.node("two", 1)
    scene.worker("1")
    scene.submit(function("a"), function("b"))
    scene.dispatcher.lose_node(one, "one is gone", set())
    scene.dispatcher.function_finished("1", finished("a", seconds=1.0))
    assert scene.states == {"a": TaskState.DONE}
    assert scene.worker("2").uids == ["b"]


async def test_functions_of_a_lost_node_that_had_not_started_run_first() -> None:
    scene = Scene()
    one, _ = scene.node("one", 1)
    scene.node("two", 1)
    scene.worker("1")
    scene.submit(function("a"), function("b"))
    scene.dispatcher.lose_node(one, "one is gone", set())
    assert scene.worker("2").uids == ["a"]


async def test_a_job_with_ranks_on_a_lost_node_is_lost_once_its_other_ranks_have_ended() -> None:
    scene = Scene()
    one, _ = scene.node("one", 2)
    two, second = scene.node("two", 2)
    scene.submit(job("a", 4), job("b", 2))
    scene.dispatcher.lose_node(one, "one is gone", set())
    assert second.messages[-1] == CancelTask("a", failed_rank=0) and not scene.events
    scene.dispatcher.task_ended(two, "a", FAILED)
    assert (scene.outcomes["a"].cause, scene.outcomes["a"].error) == (Cause.LOST, "one is gone")
    assert [rank.cause for rank in scene.outcomes["a"].ranks] == [Cause.LOST, Cause.LOST, None, Cause.EXIT_CODE]
    assert second.uids == ["a", "b"] and two.pool.free_cores == 0


async def test_a_job_that_no_node_was_asked_to_start_is_queued_again() -> None:
    permission: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def before_start(_: Sequence[str]) -> bool:
        return await permission

    scene = Scene(before_start=before_start)
    one, first = scene.node("one", 2)
    two, second = scene.node("two", 2)
    scene.submit(job("a", 4), job("b", 1))
    scene.dispatcher.lose_node(one, "one is gone", set())
    scene.dispatcher.processes.give_up_node("one", "one is gone")
    permission.set_result(True)
    for _ in range(10):  # turns of the loop, more than the answer needs
        await asyncio.sleep(0)
    assert not first.uids and second.ranks == {"b": ()}
    scene.dispatcher.task_ended(two, "b", DONE)
    assert second.uids == ["b", "a"], "its ranks share the node that is left"
    assert two.pool.free_cores == 0


async def test_tasks_for_a_lost_node_end_with_the_reason_until_it_joins_again() -> None:
    scene = Scene(expected_nodes=2)
    one, _ = scene.node("one", 1)
    scene.node("two", 1)
    scene.dispatcher.lose_node(one, "its network failed", set())
    scene.submit(process_on("a", "one"))
    assert not scene.outcomes, "the node may join again"
    scene.dispatcher.processes.give_up_node("one", "its network failed")
    assert scene.outcomes["a"].cause is Cause.LOST
    assert scene.outcomes["a"].error == (
        "host_name 'one' is no node of this engine; it has 'two'. It had more: its network failed"
    )
    _, again = scene.node("one", 1)
    scene.submit(process_on("b", "one"))
    assert again.messages == [StartWorker("3"), StartTask(process_on("b", "one"), (), ("one",))]


async def test_a_job_waits_for_a_node_that_is_away_also_where_others_came_than_were_expected() -> None:
    scene = Scene(expected_nodes=2)
    for name in ("one", "two", "three"):
        scene.node(name, 1)
    scene.dispatcher.lose_node(scene.dispatcher.nodes[2], "its network failed", set())
    scene.submit(job("a", 3, ranks_per_node=1))
    assert not scene.outcomes
    scene.dispatcher.processes.give_up_node("three", "its network failed")
    assert scene.outcomes["a"].cause is Cause.LOST


async def test_a_job_that_fits_no_more_after_a_loss_is_lost_and_one_that_never_did_is_invalid() -> None:
    scene = Scene(expected_nodes=2)
    one, _ = scene.node("one", 1)
    scene.node("two", 1)
    scene.dispatcher.lose_node(one, "its network failed", set())
    scene.dispatcher.processes.give_up_node("one", "its network failed")
    scene.submit(job("a", 4, ranks_per_node=2), job("b", 5, ranks_per_node=2))
    assert {uid: outcome.cause for uid, outcome in scene.outcomes.items()} == {"a": Cause.LOST, "b": Cause.INVALID}
    assert "this engine has 1; valid is up to 2 ranks" in str(scene.outcomes["a"].error)
    assert str(scene.outcomes["a"].error).endswith("It had more: its network failed")


async def test_the_workers_of_a_lost_node_are_not_waited_for_and_not_replaced() -> None:
    scene = Scene()
    one, _ = scene.node("one", 1)
    _, second = scene.node("two", 1)
    lost_worker = scene.worker("1")
    waited_for = scene.dispatcher.all_workers_ready
    scene.worker("2")
    scene.dispatcher.lose_node(one, "one is gone", set())
    scene.dispatcher.worker_disconnected("1", lost_worker)
    assert not waited_for and scene.dispatcher.all_workers_ready
    assert second.messages == [StartWorker("2")]
    assert not scene.dispatcher.worker_ready("1", Notes())


async def test_a_function_that_was_canceled_on_a_lost_node_ends_canceled() -> None:
    scene = Scene()
    one, _ = scene.node("one", 1)
    scene.node("two", 1)
    scene.worker("1")
    scene.submit(function("a"))
    scene.dispatcher.stop(["a"], Cause.CANCELED)
    scene.dispatcher.lose_node(one, "one is gone", set())
    assert scene.states == {"a": TaskState.CANCELED}


async def test_a_job_of_mpi_ends_once_a_rank_fails() -> None:
    layout = Layout("job", (RankGroup(2, Template()),), "auto")
    scene = Scene()
    scene.node("one", 1)
    scene.node("two", 1)
    scene.submit(task_run("a", layout))
    assert scene.outcomes["a"].cause is Cause.INVALID
    assert "2 ranks that speak MPI are too many for one node" in scene.outcomes["a"].error


@pytest.mark.parametrize("seed", range(50))
async def test_jobs_never_take_more_than_all_slots_and_all_of_them_end(seed: int) -> None:
    draw = random.Random(seed)
    slots = [draw.randint(1, 4) for _ in range(draw.randint(1, 4))]
    jobs = [(draw.randint(1, 9), draw.choice([None, 3, 4])) for _ in range(12)]
    scene = Scene()
    agents = dict(scene.node(f"node{number}", count) for number, count in enumerate(slots))
    scene.submit(*(job(f"job{number}", *ranks) for number, ranks in enumerate(jobs)))
    valid = [f"job{number}" for number, (ranks, most) in enumerate(jobs) if ranks <= (most or ranks) * len(slots)]
    running = {(node, uid) for node, agent in agents.items() for uid in agent.uids}
    ended: set[tuple[Node, str]] = set()
    while running:
        assert all(0 <= node.pool.used_cores <= node.cores for node in agents)
        node, uid = draw.choice(sorted(running, key=lambda part: (part[0].name, part[1])))
        scene.dispatcher.task_ended(node, uid, DONE)
        ended.add((node, uid))
        running = {(node, uid) for node, agent in agents.items() for uid in agent.uids} - ended
    done = [uid for uid, state in scene.states.items() if state is TaskState.DONE]
    assert sorted(done) == sorted(valid) and len(scene.states) == len(jobs)
    assert not any(node.pool.used_cores for node in agents)
