"""Conditions on results that only a worker may open."""

from __future__ import annotations

import pytest

from rhapsody_mcp.api import ComputeTask, Condition, ForEach, InvalidTask, Part, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.states import Cause

pytestmark = pytest.mark.anyio


def made() -> object:
    return {"loss": (0.25, 1), "labels": {"b"}, "rates": (0.1, 0.5)}


def long_list() -> object:
    return {"accuracy": 0.5, "data": list(range(50_000))}


def pairs() -> object:
    return [("a", 0.2), ("b", 0.9)]


def first(pair: tuple[str, float]) -> str:
    return pair[0]


def double(number: float) -> float:
    return 2 * number


async def test_objects_and_long_results_are_compared_where_they_can_be_read() -> None:
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        source, long = ComputeTask(made, name="made"), ComputeTask(long_list)
        runs = ComputeTask(double, args=(1,), when=Condition(Part(source, "/loss/0"), below=0.5))
        same = ComputeTask(double, args=(1,), when=Condition(source, "/loss", equals=[0.25, 1]))
        wrong = ComputeTask(double, args=(1,), when=Condition(source, "/los", above=1))
        gone = ComputeTask(double, args=(1,), when=Condition(source, "/los", exists=False))
        large = ComputeTask(double, args=(1,), when=Condition(long, "/accuracy", above=0.9))
        sweep = ForEach(
            Part(source, "/rates"),
            lambda rate, _: ComputeTask(double, args=(rate,), when=Condition(rate, above=0.2)),
        )
        objects = ComputeTask(pairs)
        chosen = ForEach(
            objects, lambda pair, _: ComputeTask(first, args=(pair,), when=Condition(pair, "/1", above=0.5))
        )
        whole = ForEach(
            [1, 2], lambda number, _: ComputeTask(double, args=(number,)), when=Condition(source, "/loss/1", above=1)
        )
        tasks = [source, long, runs, same, wrong, gone, large, sweep, whole, objects, chosen]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
        assert [task.return_value for task in (runs, same, gone)] == [2, 2, 2]
        assert wrong.cause is Cause.INVALID and wrong.exception is not None and "'loss'" in str(wrong.exception)
        assert large.cause is whole.cause is Cause.SKIPPED
        assert sweep.return_value == [None, 1.0]
        assert chosen.return_value == [None, "b"]
        assert "item 0/1 is 0.2, not above 0.5" in str(chosen.children[0].exception)
        assert session.counts == {"DONE": 8, "FAILED": 1, "skipped": 5}


def test_a_for_each_and_its_tasks_cannot_both_have_a_condition() -> None:
    condition = Condition(ComputeTask(made), exists=True)
    with pytest.raises(InvalidTask, match="not to both"):
        ForEach([1], lambda n, _: ComputeTask(double, args=(n,), when=condition), when=condition)
    with pytest.raises(InvalidTask, match="is a Condition"):
        ComputeTask(double, args=(1,), when={"above": 1})
