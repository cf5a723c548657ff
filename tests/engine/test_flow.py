"""How tasks follow one another, on real processes: for each item, after others, again after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.serialization import Module
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Part, Task

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def session(request: Any) -> AsyncIterator[Session]:
    async with Session([await request.param(num_workers=2)]) as session:
        yield session


async def run(session: Session, *tasks: Task) -> None:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)


def square(x: int) -> int:
    return x * x


def numbers() -> list[int]:
    return [3, 4, 5]


def sets() -> list[set[int]]:
    return [{1, 2}, {3}]


def long_texts() -> list[str]:
    return ["a" * 40_000, "b" * 50_000]


def picky(x: int) -> int:
    if x == 2:
        raise ValueError("two is bad")
    return x


def third_time_lucky(path: str) -> int:
    with open(path, "a+") as file:
        file.write("x")
        attempt = file.tell()
    if attempt < 3:
        raise RuntimeError(f"attempt {attempt}")
    return attempt


async def test_one_task_for_each_item_of_a_list_and_of_a_result(session: Session) -> None:
    made = ComputeTask(numbers)
    listed = ForEach([1, 2, 3], lambda item, _: ComputeTask(square, args=(item,)), name="listed")
    found = ForEach(made, lambda item, _: ComputeTask(square, args=(item,)))
    total = ComputeTask(sum, args=(found,))
    await run(session, made, listed, found, total)
    assert (listed.return_value, found.return_value, total.return_value) == ([1, 4, 9], [9, 16, 25], 50)
    assert [child.name for child in listed.children] == ["listed[0]", "listed[1]", "listed[2]"]
    assert [child.parent for child in found.children] == [found] * 3


async def test_items_and_results_that_are_no_json_go_from_worker_to_worker(session: Session) -> None:
    made = ComputeTask(sets)
    sizes = ForEach(made, lambda item, _: ComputeTask(len, args=(item,)))
    same = ForEach(made, lambda item, _: ComputeTask(set.union, args=(item, {9})))
    used = ComputeTask(repr, args=(same,))
    await run(session, made, sizes, same, used)
    assert (sizes.return_value, same.return_value) == ([2, 1], [{1, 2, 9}, {3, 9}])
    assert used.return_value == repr([{1, 2, 9}, {3, 9}])


def spread() -> object:
    return {3, 1, 2}


def steps() -> range:
    return range(0, 6, 2)


def odd() -> dict[str, float]:
    return {"a": float("nan")}


async def test_what_is_like_a_list_is_taken_for_one_and_what_is_not_fails_once(session: Session) -> None:
    made = [ComputeTask(function) for function in (spread, steps, odd)]
    each = [ForEach(task, lambda item, _: ComputeTask(square, args=(item,))) for task in made]
    await run(session, *made, *each)
    assert [task.return_value for task in each[:2]] == [[1, 4, 9], [0, 4, 16]]
    assert (each[2].cause, each[2].children) == (Cause.INVALID, [])
    assert "for_each needs a list: TypeError: the result is of type dict" in str(each[2].exception)


async def test_a_path_leads_into_what_is_like_a_list_and_to_keys_that_are_numbers(session: Session) -> None:
    made, keyed, text = ComputeTask(steps), ComputeTask(dict, args=([(1, {"a"})],)), ComputeTask(str, args=("abc",))
    used = [ComputeTask(repr, args=(Part(task, path),)) for task, path in ((made, "/2"), (keyed, "/1"), (text, "/0"))]
    await run(session, made, keyed, text, *used)
    assert [task.return_value for task in used[:2]] == ["4", "{'a'}"]
    assert used[2].cause is Cause.INVALID


async def test_a_result_can_be_all_arguments_by_name(session: Session) -> None:
    best = ComputeTask(dict, kwargs={"a": 2, "b": {5}})
    use = ComputeTask(lambda a, b: (a, b), kwargs=best)
    await run(session, best, use)
    assert use.return_value == (2, {5})


async def test_long_results_are_put_together_in_a_file(session: Session) -> None:
    made = ComputeTask(long_texts)
    upper = ForEach(made, lambda item, _: ComputeTask(str.upper, args=(item,)))
    lengths = ComputeTask(lambda texts: [(text[0], len(text)) for text in texts], args=(upper,))
    await run(session, made, upper, lengths)
    assert lengths.return_value == [("A", 40_000), ("B", 50_000)]
    assert upper.outcome is not None and upper.outcome.value is not None and upper.outcome.value.file is not None


async def test_where_one_fails_a_task_that_runs_nevertheless_gets_the_others(session: Session) -> None:
    some = ForEach([1, 2, 3], lambda item, _: ComputeTask(picky, args=(item,)), name="some")
    gone = ComputeTask(picky, args=(2,))
    needs = ComputeTask(len, args=(some,))
    anyway = ComputeTask(repr, args=([some, gone],), on_upstream_failure="run")
    await run(session, some, gone, needs, anyway)
    assert (some.state, some.cause, needs.cause) == (TaskState.FAILED, Cause.ERROR, Cause.UPSTREAM)
    assert anyway.return_value == "[[1, None, 3], None]"


async def test_a_task_starts_after_those_that_it_follows(session: Session, tmp_path: Path) -> None:
    first = ComputeTask(executable="/bin/sh", arguments=["-c", f"sleep 0.3; echo made > {tmp_path}/file"])
    then = ComputeTask(executable="cat", arguments=[f"{tmp_path}/file"], after=[first])
    await run(session, then, first)
    assert then.return_value == "made"
    lost = ComputeTask(executable="false")
    never = ComputeTask(executable="touch", arguments=[f"{tmp_path}/never"], after=[lost])
    always = ComputeTask(executable="echo", arguments=["cleaned up"], after=[lost], on_upstream_failure="run")
    await run(session, lost, never, always)
    assert (never.cause, always.return_value) == (Cause.UPSTREAM, "cleaned up")
    assert not (tmp_path / "never").exists()


async def test_a_task_that_fails_is_started_again_as_often_as_it_says(session: Session, tmp_path: Path) -> None:
    again = ComputeTask(third_time_lucky, args=(str(tmp_path / "a"),), retries=5, retry_delay_s=0.01)
    once = ComputeTask(third_time_lucky, args=(str(tmp_path / "b"),), retries=1, retry_delay_s=0.01)
    crash = ComputeTask(executable="/bin/sh", arguments=["-c", "kill -9 $$"], retries=1, retry_delay_s=0.01)
    wrong = ComputeTask(executable="no-such-program", retries=5)
    await run(session, again, once, crash, wrong)
    assert (again.return_value, again.attempts) == (3, 3)
    assert "attempt 3 of 6; attempt 2 ended with cause error: RuntimeError: attempt 2" in again.notes
    assert (once.state, once.attempts, once.cause) == (TaskState.FAILED, 2, Cause.ERROR)
    assert (crash.attempts, crash.cause) == (2, Cause.CRASHED)
    assert (wrong.attempts, wrong.cause) == (1, Cause.INVALID)


async def test_a_task_that_waits_for_its_next_attempt_can_be_canceled(session: Session) -> None:
    task = ComputeTask(executable="false", retries=3, retry_delay_s=600)
    has_failed = asyncio.Event()
    session.on_change.add(lambda changed: has_failed.set() if changed is task and task.last_failure else None)
    await session.submit_tasks([task])
    async with asyncio.timeout(600):
        await has_failed.wait()
        await session.cancel(task)
    session.on_change.clear()
    assert (task.state, task.cause, task.attempts) == (TaskState.CANCELED, Cause.CANCELED, 1)


async def test_items_that_wait_for_their_own_results_are_refused(session: Session) -> None:
    made = ComputeTask(numbers)
    late: list[Task] = []
    looped = ForEach(made, lambda item, _: ComputeTask(max, args=(item, late[0])))
    late.append(ComputeTask(Module("builtins:sum"), args=(looped,)))
    await run(session, made, looped, *late)
    assert (looped.cause, late[0].cause) == (Cause.INVALID, Cause.UPSTREAM)


async def test_a_circle_through_a_for_each_is_refused_when_it_is_submitted(session: Session) -> None:
    inner = ComputeTask(square, args=(2,))
    each = ForEach([1], lambda item, _: ComputeTask(max, args=(item, inner)))
    inner.args = (each,)
    with pytest.raises(InvalidTask, match="in a circle"):
        await session.submit_tasks([inner, each])
