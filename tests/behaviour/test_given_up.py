"""What the replies after waits that were given up show: nothing that ended meanwhile is lost."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import pytest

from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.waiting import patience
from tests.agents import Agent, open_agent
from tests.behaviour.test_patience import UNKNOWN, give_up
from tests.behaviour.test_tasks_extension import Polls, Waits, created, open_house

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}


async def opened(agent: Agent, *names: str) -> Agent:
    """With tasks of these names, which run until they are canceled."""
    await agent.session()
    agent.backend.may_finish.clear()
    await agent.call("submit_tasks", **SESSION, tasks=[{"name": name, "prompt": "x"} for name in names])
    return agent


async def cancel(agent: Agent, name: str) -> None:
    await agent.call("cancel_tasks", **SESSION, tasks=[name], force=True)


async def ends_shown(agent: Agent) -> list[str]:
    """What a wait for open tasks shows now."""
    reply = await agent.call("wait_tasks", **SESSION, state="open", timeout_s=0)
    return [name for group in reply["failures"] for name in group["tasks"]]


@pytest.mark.parametrize("wrong", [{"until": {"task": "none", "text": "x"}}, {"cursor": "none"}])
async def test_a_refused_wait_takes_nothing_from_the_next(wrong: dict[str, Any]) -> None:
    async with open_agent() as agent:
        await opened(agent, "ends", "runs")
        await give_up(agent, state="open")
        await cancel(agent, "ends")
        await agent.refusal("wait_tasks", **SESSION, state="open", **wrong)
        assert await ends_shown(agent) == ["ends"]
        assert "your client gave up a wait" in agent.texts[-1]
        assert await ends_shown(agent) == []


async def test_of_waits_that_are_given_up_at_a_time_the_earliest_counts() -> None:
    async with open_agent() as agent:
        await opened(agent, "ends", "runs")
        async with anyio.create_task_group() as group:
            group.start_soon(partial(give_up, agent, 0.5, state="open"))
            await anyio.wait_all_tasks_blocked()
            await cancel(agent, "ends")
            group.start_soon(partial(give_up, agent, 0.8, state="open"))
        assert await ends_shown(agent) == ["ends"]


async def test_a_wait_that_is_given_up_without_a_word_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_CAUTIOUS_S", 0.05)
    async with open_agent() as agent:
        await opened(agent, "ends", "runs")
        async with anyio.create_task_group() as group:
            silent = {**SESSION, "state": "open", "timeout_s": 30}
            group.start_soon(partial(agent.call, "wait_tasks", **silent))
            await anyio.wait_all_tasks_blocked()
            await anyio.sleep(0.1)  # longer than the careful default, after which the client may have given up
            await cancel(agent, "ends")
            assert await ends_shown(agent) == ["ends"]
            assert await ends_shown(agent) == []
            await cancel(agent, "runs")  # which ends the silent wait


async def test_a_deferred_wait_that_is_canceled_counts_too() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        await client.call_tool("submit_tasks", {**SESSION, "tasks": [{"name": "runs", "prompt": "x"}]})
        handle = await created(client, "wait_tasks", **SESSION, state="open")
        await client.call_tool("cancel_tasks", {**SESSION, "tasks": ["held"], "force": True})
        await Waits(client.session).send("tasks/cancel", handle.task_id)
        reply = await client.call_tool("wait_tasks", {**SESSION, "state": "open", "timeout_s": 0})
        assert reply.structured_content is not None
        assert reply.structured_content["failures"][0]["tasks"] == ["held"]


async def test_a_wait_is_not_told_to_be_longer_than_the_service_lets_it_be() -> None:
    settings = Settings(wait_cap_s=0.1)
    async with open_agent(settings=settings, client_info=UNKNOWN) as agent:
        await opened(agent, "runs")
        assert (await agent.call("wait_tasks", **SESSION))["asked_timeout_s"] == 0.1
        assert "waits longer" not in agent.texts[-1] and "asked" not in agent.texts[-1]
