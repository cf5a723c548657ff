"""What failed is run again in place: the same names, whole results, attempts that go on counting."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

SQUARE = "def square(x):\n    return x * x"
SWEEP = {"name": "sweep", "source": SQUARE, "args": [{"item": True}], "for_each": [1, 2, 3, 4]}
TOTAL = {"name": "total", "function": "builtins:sum", "args": [{"ref": "sweep"}]}
LAST = {"name": "last", "function": "builtins:str", "args": [{"ref": "total"}]}


class Flaky:
    """Fails the tasks with these ids until it is mended."""

    def __init__(self, *uids: str) -> None:
        self.bad = set(uids)
        self.runs: list[str] = []
        self.backend = ScriptedBackend(self.perform)

    def perform(self, spec: TaskSpec, values: list[Any]) -> Any:
        self.runs.append(spec.uid)
        if spec.uid in self.bad:
            raise ValueError("by chance")
        return perform(spec, values)


async def submit(agent: Agent, *tasks: dict[str, Any]) -> dict[str, Any]:
    """The reply of the wait."""
    session = await agent.session()
    await agent.call("submit_tasks", session=session, tasks=list(tasks))
    return await agent.call("wait_tasks", session=session)


async def again(agent: Agent, *names: str, **options: Any) -> dict[str, Any]:
    return await agent.call("submit_tasks", session="session-1", retry=list(names), **options)


async def wait(agent: Agent, **options: Any) -> dict[str, Any]:
    return await agent.call("wait_tasks", session="session-1", **options)


async def result(agent: Agent, task: str) -> dict[str, Any]:
    return await agent.call("get_result", session="session-1", task=task)


async def test_only_the_failed_items_run_again_and_the_list_is_whole_and_what_needs_it_runs() -> None:
    flaky = Flaky("task.000001[1]", "task.000001[2]")
    async with open_agent(backend=flaky.backend) as agent:
        reply = await submit(agent, SWEEP, TOTAL, LAST)
        assert reply["counts"] == {"DONE": 2, "FAILED": 2, "CANCELED": 2}
        flaky.bad.clear()
        flaky.runs.clear()
        answer = await again(agent, "sweep")
        assert answer["submitted"] == 4 and answer["names"].keys() == {"sweep", "total", "last"}
        assert "Runs again 4 tasks: sweep[1], sweep[2], total, last" in agent.texts[-1]
        reply = await wait(agent, cursor=reply["cursor"])
        assert reply["ended"] and reply["counts"] == {"DONE": 6} and reply["failures"] == []
        assert {row["name"] for row in reply["done"]} == {"sweep", "total", "last"}
        assert sorted(flaky.runs) == ["task.000001[1]", "task.000001[2]", "task.000002", "task.000003"]
        assert (await result(agent, "sweep"))["result"] == [1, 4, 9, 16]
        assert (await result(agent, "last"))["result"] == "30"
        item = await result(agent, "sweep[1]")
        assert (item["result"], item["attempts"]) == (4, 2)
        assert item["notes"] == ["attempt 2 of 2; attempt 1 ended with cause error: ValueError: by chance"]
        statistics = await agent.call("get_statistics", session="session-1")
        assert statistics["counts"] == {"DONE": 6} and statistics["ran"] == 6


async def test_one_item_alone_runs_again_by_its_name() -> None:
    flaky = Flaky("task.000001[1]", "task.000001[2]")
    async with open_agent(backend=flaky.backend) as agent:
        await submit(agent, SWEEP, TOTAL)
        flaky.bad.clear()
        await again(agent, "sweep[2]")
        assert (await wait(agent))["counts"] == {"DONE": 3, "FAILED": 1, "CANCELED": 1}
        assert (await result(agent, "sweep"))["result"] == [1, None, 9, 16]
        await again(agent, "total")  # and what it needs
        assert (await wait(agent))["counts"] == {"DONE": 5}
        assert (await result(agent, "total"))["result"] == 30


async def test_an_item_runs_again_while_others_still_run() -> None:
    flaky, go_on = Flaky("task.000001[1]"), asyncio.Event()

    async def script(spec: TaskSpec, values: list[Any]) -> Any:
        if spec.uid == "task.000001[0]":
            await go_on.wait()
        return flaky.perform(spec, values)

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        await agent.call("submit_tasks", session=await agent.session(), tasks=[SWEEP, TOTAL])
        reply = await wait(agent, count=3)
        assert reply["counts"] == {"RUNNING": 1, "FAILED": 1, "DONE": 2, "WAITING": 1}
        flaky.bad.clear()
        assert (await again(agent, "sweep"))["submitted"] == 1
        assert (await wait(agent, tasks=["sweep[1]"]))["counts"] == {"DONE": 1}
        assert not (await wait(agent, timeout_s=0))["ended"]
        go_on.set()
        assert (await wait(agent))["counts"] == {"DONE": 5}
        assert (await result(agent, "total"))["result"] == 30


async def test_retries_are_had_anew_and_the_error_says_when_they_are_used_up() -> None:
    flaky = Flaky("task.000001")
    once = {"name": "once", "function": "builtins:int", "retries": 2, "retry_delay_s": 0}
    async with open_agent(backend=flaky.backend) as agent:
        reply = await submit(agent, once)
        assert reply["failures"][0]["error"] == "ValueError: by chance (failed 3 times, its 2 retries are used up)"
        await again(agent, "once")
        reply = await wait(agent)
        assert len(flaky.runs) == 6
        assert reply["failures"][0]["error"] == "ValueError: by chance (failed 6 times, its 2 retries are used up)"
        flaky.bad.clear()
        await again(agent, "once")
        assert (await wait(agent))["done"][0]["attempts"] == 7


async def test_a_running_task_says_which_attempt_it_is() -> None:
    flaky = Flaky("task.000001")
    async with open_agent(backend=flaky.backend) as agent:
        await submit(agent, {"name": "once", "function": "builtins:int", "retries": 3, "retry_delay_s": 0})
        flaky.backend.may_finish.clear()
        await again(agent, "once")
        assert "once RUNNING, attempt 5 of 8" in (await wait(agent, timeout_s=0.2))["open"]
        row = (await agent.call("list_tasks", session="session-1"))["tasks"][0]
        assert row["attempts"] == 5 and row["seconds"] >= 0
        assert ", attempt 5 of 8" in agent.texts[-1] and "RUNNING for" in agent.texts[-1]


async def test_where_nothing_failed_the_refusal_says_so() -> None:
    async with open_agent() as agent:
        await submit(agent, SWEEP, TOTAL)
        text = await agent.refusal("submit_tasks", session="session-1", retry=["sweep", "total"])
        assert "nothing is to run again: sweep is DONE, total is DONE" in text
        text = await agent.refusal("submit_tasks", session="session-1", retry=["sweap"])
        assert "did you mean 'sweep'" in text
        text = await agent.refusal("submit_tasks", session="session-1")
        assert "tasks=[...]" in text and "retry" in text
        await agent.refusal("submit_tasks", session="session-1", tasks=[TOTAL], retry=["sweep"])


async def test_a_canceled_task_runs_again_and_a_replaced_one_does_not() -> None:
    flaky = Flaky("task.000002")
    async with open_agent(backend=flaky.backend) as agent:
        flaky.backend.may_finish.clear()
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[{"name": "long", "function": "builtins:int"}])
        await agent.call("cancel_tasks", session=session, tasks=["long"])
        flaky.backend.may_finish.set()
        await again(agent, "long")
        assert (await wait(agent))["counts"] == {"DONE": 1}
        bad = {"name": "bad", "function": "builtins:int"}
        await agent.call("submit_tasks", session=session, tasks=[bad])
        await wait(agent)
        await agent.call("submit_tasks", session=session, tasks=[bad])
        await wait(agent)
        text = await agent.refusal("submit_tasks", session=session, retry=["task.000002"])
        assert "task.000003 has taken its name" in text


async def test_a_repeated_call_with_its_key_runs_nothing_twice_and_a_dry_run_nothing_at_all() -> None:
    flaky = Flaky("task.000001[1]")
    async with open_agent(backend=flaky.backend) as agent:
        await submit(agent, SWEEP, TOTAL)
        reply = await again(agent, "sweep", dry_run=True)
        assert reply["submitted"] == 2 and "Would run again 2 tasks" in agent.texts[-1]
        assert agent.texts[-1].endswith("Next: the same call without dry_run.")
        await again(agent, "sweep", idempotency_key="k")
        await wait(agent)
        runs = list(flaky.runs)
        reply = await again(agent, "sweep", idempotency_key="k")
        assert reply["repeated"] and flaky.runs == runs
        await agent.refusal("submit_tasks", session="session-1", retry=["total"], idempotency_key="k")


async def test_what_runs_again_counts_in_the_budget() -> None:
    flaky = Flaky("task.000001[1]")
    async with open_agent(backend=flaky.backend, settings=Settings(budget_tasks=6)) as agent:
        await submit(agent, SWEEP, TOTAL)
        assert "budget is 6" in await agent.refusal("submit_tasks", session="session-1", retry=["sweep"])
        await again(agent, "sweep", force=True)


async def test_the_second_run_outlives_the_service(tmp_path: Path) -> None:
    life = partial(open_agent, ledger=tmp_path)
    flaky = Flaky("task.000001[1]", "task.000001[2]")
    async with life(backend=flaky.backend) as agent:
        await submit(agent, SWEEP | {"retries": 1, "retry_delay_s": 0}, TOTAL)
        flaky.bad.remove("task.000001[1]")
        flaky.backend.may_start.clear()
        await again(agent, "sweep", idempotency_key="k")
    flaky = Flaky("task.000001[2]")
    async with life(backend=flaky.backend) as agent:
        assert (await again(agent, "sweep", idempotency_key="k"))["repeated"]
        assert (await wait(agent))["counts"] == {"DONE": 3, "FAILED": 1, "CANCELED": 1}
        assert sorted(flaky.runs) == ["task.000001[1]", *["task.000001[2]"] * 2]
        assert "failed 4 times, its retry is used up" in (await result(agent, "sweep[2]"))["error"]
        flaky.bad.clear()
        await again(agent, "sweep")
        assert (await wait(agent))["counts"] == {"DONE": 5}
    async with life() as agent:
        reply = await wait(agent)
        assert reply["counts"] == {"DONE": 5}
        assert (await result(agent, "sweep"))["result"] == [1, 4, 9, 16]
        assert (await result(agent, "total"))["result"] == 30
        assert (await result(agent, "sweep[2]"))["attempts"] == 5


async def test_a_for_each_whose_items_were_not_there_runs_again_with_them() -> None:
    flaky = Flaky("task.000001")
    async with open_agent(backend=flaky.backend) as agent:
        numbers = {"name": "numbers", "source": "def numbers():\n    return [1, 2]"}
        reply = await submit(agent, numbers, SWEEP | {"for_each": {"ref": "numbers"}}, TOTAL)
        assert reply["counts"] == {"FAILED": 1, "CANCELED": 2}
        flaky.bad.clear()
        await again(agent, "total")
        assert (await wait(agent))["counts"] == {"DONE": 4}
        assert (await result(agent, "total"))["result"] == 5


async def test_what_was_skipped_because_of_a_failure_is_decided_again() -> None:
    flaky = Flaky("task.000001")
    async with open_agent(backend=flaky.backend) as agent:
        score = {"name": "score", "source": "def score():\n    return 0.9"}
        costly = {"name": "costly", "function": "builtins:int", "when": {"ref": "score", "above": 0.5}}
        after = {"name": "after", "function": "builtins:int", "after": ["costly"]}
        reply = await submit(agent, score, costly | {"on_upstream_failure": "run"}, after)
        assert reply["counts"] == {"FAILED": 1, "skipped": 2}
        flaky.bad.clear()
        assert (await again(agent, "score"))["submitted"] == 3
        assert (await wait(agent))["counts"] == {"DONE": 3}
        text = await agent.refusal("submit_tasks", session="session-1", retry=["costly"])
        assert "costly is DONE" in text


async def test_what_still_waits_waits_also_for_what_runs_again() -> None:
    flaky, go_on = Flaky("task.000001"), asyncio.Event()

    async def script(spec: TaskSpec, values: list[Any]) -> Any:
        if spec.uid == "task.000002":
            await go_on.wait()
        return flaky.perform(spec, values)

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        score = {"name": "score", "source": "def score():\n    return 7"}
        long = {"name": "long", "function": "builtins:int"}
        both = {"name": "both", "function": "builtins:repr", "args": [{"ref": "score"}], "after": ["long"]}
        more = {"name": "more", "function": "builtins:repr", "args": [[{"ref": "score"}]]}
        run = {"on_upstream_failure": "run"}
        await agent.call(
            "submit_tasks", session=await agent.session(), tasks=[score, long, both | run, more | run, SWEEP]
        )
        assert (await wait(agent, tasks=["score", "more"]))["counts"] == {"FAILED": 1, "DONE": 1}
        flaky.bad.clear()
        reply = await again(agent, "score", "more")
        assert reply["names"].keys() == {"score", "more"}
        go_on.set()
        assert (await wait(agent))["counts"] == {"DONE": 8}
        assert (await result(agent, "both"))["result"] == "7"
        assert (await result(agent, "more"))["result"] == "[7]"


async def test_a_task_whose_name_was_taken_stays_as_it_is_when_its_source_runs_again() -> None:
    flaky = Flaky("task.000001")
    async with open_agent(backend=flaky.backend) as agent:
        first = {"name": "first", "source": SQUARE, "args": [3]}
        await submit(agent, first, {"name": "second", "function": "builtins:str", "args": [{"ref": "first"}]})
        await agent.call("submit_tasks", session="session-1", tasks=[{"name": "second", "function": "builtins:dict"}])
        flaky.bad.clear()
        await again(agent, "first")
        assert (await wait(agent))["counts"] == {"DONE": 2}
        assert (await result(agent, "first"))["result"] == 9
