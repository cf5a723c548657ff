"""Replies whose data is complete by itself, and whose texts say nothing twice."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import open_agent, outcome_of, perform

pytestmark = pytest.mark.anyio

LONG = "a long error that every one of these tasks has " * 5
INT = {"function": "builtins:int"}


async def test_a_list_has_each_error_whole_in_its_data_and_once_in_its_text() -> None:
    async with open_agent(backend=outcome_of(state=TaskState.FAILED, cause=Cause.ERROR, error=LONG)) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[INT] * 60)
        await agent.call("wait_tasks", session=session)
        reply = await agent.call("list_tasks", session=session, limit=2)
        assert [row["error"] for row in reply["tasks"]] == [LONG, LONG]
        assert agent.texts[-1].count("a long error") == 5 and "the same as above" in agent.texts[-1]
        await agent.call("list_tasks", session=session, limit=50)
        assert len(agent.texts[-1]) + len(str(agent.replies[-1].structured_content)) < 26_000


async def test_a_failed_job_says_what_came_of_its_other_ranks() -> None:
    ranks = (
        RankOutcome(0, exit_code=0),
        RankOutcome(1, exit_code=3, error="exit code 3"),
        RankOutcome(2, exit_code=0),
        RankOutcome(3, exit_code=-15, error="ended, because rank 1 failed"),
    )
    backend = outcome_of(state=TaskState.FAILED, cause=Cause.EXIT_CODE, error="rank 1 of 4: exit code 3", ranks=ranks)
    async with open_agent(backend=backend) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[{"name": "job", "executable": "true", "ranks": 4}])
        reply = await agent.call("wait_tasks", session=session)
        detail = "other ranks: 0, 2: ended well, 3: ended, because rank 1 failed"
        assert reply["failures"][0]["detail"] == detail and detail in agent.texts[-1]


async def test_a_refusal_of_several_tasks_says_once_what_is_valid() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        text = await agent.refusal("submit_tasks", session=session, tasks=[INT | {"backend": "x"}] * 3)
        assert text.count("Valid:") == 1 and "tasks[0]" in text and "tasks[2]" in text
        text = await agent.refusal("submit_tasks", session=session, tasks=[INT | {"fo": 1}, INT | {"fo": 1, "ba": 2}])
        assert text.count("Valid:") == 1


async def test_a_running_task_shows_for_how_long_and_on_which_node() -> None:
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    async with open_agent(backend=backend) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[INT | {"name": "long"}])
        await agent.call("wait_tasks", session=session, timeout_s=0.2)
        agent.sessions.get(session).task("long").placed_on = ("node7",)
        row: dict[str, Any] = (await agent.call("list_tasks", session=session))["tasks"][0]
        assert 0.05 < row["seconds"] < 60 and row["nodes"] == "node7"
        assert "RUNNING for" in agent.texts[-1] and "on node7" in agent.texts[-1]


async def test_a_sweep_over_a_result_that_is_there_counts_its_tasks_in_the_budget() -> None:
    async with open_agent(settings=Settings(budget_tasks=8)) as agent:
        session = await agent.session()
        numbers = {"name": "numbers", "source": "def numbers():\n    return list(range(9))"}
        await agent.call("submit_tasks", session=session, tasks=[numbers])
        await agent.call("wait_tasks", session=session)
        each = {"function": "builtins:abs", "args": [{"item": True}], "for_each": {"ref": "numbers"}}
        assert "budget is 8" in await agent.refusal("submit_tasks", session=session, tasks=[each])
        await agent.call("submit_tasks", session=session, tasks=[each], dry_run=True)
        assert "a task for each item of numbers, 9 now" in agent.texts[-1]


@pytest.mark.parametrize(("asked", "waited"), [(100.0, 1.96), (1.0, 1.0)])
async def test_a_wait_leaves_time_before_its_cap_for_the_reply(
    asked: float, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []

    async def wait_for(*_: object, timeout_s: float, **__: object) -> tuple[float, None]:
        timeouts.append(timeout_s)
        return timeout_s, None

    monkeypatch.setattr("rhapsody_mcp.toolsets.tasks.wait_for", wait_for)
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    async with open_agent(backend=backend, settings=Settings(wait_cap_s=2.0)) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[INT])
        reply = await agent.call("wait_tasks", session=session, timeout_s=asked)
        assert (timeouts, reply["applied_timeout_s"]) == ([waited], min(asked, 2.0))
