"""How long a wait takes that says no time, and what becomes of a wait that the client gives up."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import MCPError
from mcp.types import Implementation

from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.waiting import patience
from tests.agents import Agent, open_agent
from tests.services import own_service

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
HELD = {"name": "held", "prompt": "x"}
UNKNOWN = Implementation(name="mcp", version="1")
"""A client that has no name of its own."""


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the careful default be 0.05 s."""
    monkeypatch.setattr(patience, "_CAUTIOUS_S", 0.05)


async def opened(agent: Agent, *tasks: dict[str, Any]) -> Agent:
    """With these tasks, which do not end before they may."""
    await agent.session()
    agent.backend.may_finish.clear()
    await agent.call("submit_tasks", **SESSION, tasks=list(tasks or [HELD]))
    return agent


async def give_up(agent: Agent, after_s: float = 0.2, **arguments: Any) -> None:
    """Ask for a wait, and no longer wait for the reply so long after the wait has begun."""
    replies: list[Any] = []

    async def ask() -> None:
        replies.append(await agent.call("wait_tasks", **SESSION, timeout_s=30, **arguments))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        await anyio.sleep(after_s)
        group.cancel_scope.cancel()
    assert not replies


def given_up_after_s(agent: Agent) -> float:
    """As the last reply tells it."""
    told = re.search(r"your client gave up a wait after ([\d.]+) (ms|s);", agent.texts[-1])
    assert told is not None
    return float(told[1]) / (1000 if told[2] == "ms" else 1)


@pytest.mark.parametrize("era", ["auto", "legacy"])
@pytest.mark.parametrize(("name", "allowed_s"), [("mcp", 0.05), ("fastmcp", 0.05), ("claude-code", 0.2)])
@pytest.mark.usefixtures("_hasty")
async def test_a_client_of_which_nothing_is_known_gets_a_reply_soon(name: str, allowed_s: float, era: str) -> None:
    client_info = Implementation(name=name, version="1")
    async with open_agent(era, settings=Settings(wait_default_s=0.2), client_info=client_info) as agent:
        await opened(agent)
        reply = await agent.call("wait_tasks", **SESSION)
        assert (reply["asked_timeout_s"], reply["ended"]) == (allowed_s, False)
        longer = "With timeout_s=0.2 it waits longer, if your client lets a call take so long"
        assert (longer in agent.texts[-1]) == (allowed_s < 0.2)


@pytest.mark.usefixtures("_hasty")
async def test_a_time_that_is_asked_for_is_kept_to_and_proves_nothing() -> None:
    async with open_agent(settings=Settings(wait_default_s=2.0), client_info=UNKNOWN) as agent:
        await opened(agent)
        reply = await agent.call("wait_tasks", **SESSION, timeout_s=0.3)
        assert reply["applied_timeout_s"] == 0.3 and reply["waited_s"] >= 0.3
        assert (await agent.call("wait_tasks", **SESSION, timeout_s=0))["applied_timeout_s"] == 0
        assert (await agent.call("wait_tasks", **SESSION))["applied_timeout_s"] == 0.05


@pytest.mark.usefixtures("_hasty")
async def test_after_a_wait_that_was_given_up_the_next_are_shorter_and_say_so() -> None:
    client_info = Implementation(name="impatient", version="1")
    async with open_agent(settings=Settings(wait_default_s=5.0), client_info=client_info) as agent:
        await opened(agent)
        before = time.monotonic()
        await give_up(agent, 0.5)
        reply = await agent.call("wait_tasks", **SESSION)
        assert 0.4 < given_up_after_s(agent) < time.monotonic() - before
        assert reply["applied_timeout_s"] == pytest.approx(0.8 * given_up_after_s(agent), abs=0.06)
        assert "it waits longer" not in agent.texts[-1]
        await agent.call("wait_tasks", **SESSION, timeout_s=given_up_after_s(agent) + 0.3)
        assert "gave up" not in agent.texts[-1]
        await give_up(agent, 0.6)
        reply = await agent.call("wait_tasks", **SESSION, timeout_s=30)
        assert reply["applied_timeout_s"] == pytest.approx(0.8 * given_up_after_s(agent), abs=0.06)
        assert reply["asked_timeout_s"] == 30 and "(asked 30 s)" in agent.texts[-1]
        assert "without timeout_s a wait takes less" in agent.texts[-1]
        await agent.call("wait_tasks", **SESSION, timeout_s=0.9)
        assert (await agent.call("wait_tasks", **SESSION))["applied_timeout_s"] >= 0.05


@pytest.mark.parametrize("selection", [{}, {"state": "open"}, {"tasks": ["held"]}, {"state": "open", "count": 1}])
async def test_what_ended_during_a_wait_that_was_given_up_is_in_the_next(selection: dict[str, Any]) -> None:
    async with open_agent() as agent:
        await opened(agent)
        await give_up(agent, **selection)
        agent.backend.may_finish.set()
        await agent.call("wait_tasks", **SESSION, state="RUNNING", timeout_s=20)
        reply = await agent.call("wait_tasks", **SESSION, timeout_s=20, **selection)
        assert [row["name"] for row in reply["done"]] == ["held"] and reply["waited_s"] < 5


async def test_a_count_goes_on_from_the_wait_that_was_given_up() -> None:
    async with open_agent() as agent:
        await opened(agent, HELD)
        await give_up(agent, count=1)
        agent.backend.may_finish.set()
        await agent.call("wait_tasks", **SESSION, tasks=["held"], timeout_s=20)
        agent.backend.may_finish.clear()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "later", "prompt": "y"}])
        reply = await agent.call("wait_tasks", **SESSION, count=1, timeout_s=20)
        assert (reply["ended"], reply["waited_s"] < 5) == (False, True)


async def test_setup_lines_that_take_longer_than_a_call_may_are_tried_once(tmp_path: Path) -> None:
    lines = [f"echo tried >>{tmp_path}/tries", "sleep 1"]
    wanted = {"name": "slow", "environment": {"setup": lines}}
    with own_service() as service:
        async with service.client() as client:
            with pytest.raises(MCPError, match="timed out"):
                await client.call_tool("create_session", wanted, read_timeout_seconds=0.5)
            opened = await client.call_tool("create_session", wanted)
            assert not opened.is_error
    assert (tmp_path / "tries").read_text() == "tried\n"
