"""Interruptions: replies that are lost, waits that are given up, work that is stopped, engines that are slow."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import anyio
import pytest
from mcp import MCPError
from mcp.types import ElicitResult

from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name

pytestmark = pytest.mark.anyio

SLEEPER = {"executable": "/bin/sleep", "arguments": ["600"]}


@pytest.fixture
def gate(tmp_path: Path) -> anyio.Path:
    """A pipe: a task that reads it goes on when it is written to."""
    os.mkfifo(tmp_path / "gate")
    return anyio.Path(tmp_path / "gate")


async def test_a_call_whose_reply_was_lost_is_repeated_and_nothing_runs_twice(agent: Traveller, tmp_path: Path) -> None:
    await agent.create("local")
    log = tmp_path / "log"
    append = {"name": "append", "executable": "/bin/sh", "arguments": ["-c", f"echo {{item}} >> {log}"]}
    task = append | {"for_each": [1, 2, 3]}
    lost = agent.line.lose_next_reply()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: agent.submit(task, idempotency_key="append-1"))
        await lost.wait()
        group.cancel_scope.cancel()
    again = await agent.submit(task, idempotency_key="append-1")
    assert again["repeated"] and again["names"] == {"append": "task.000001"}
    assert (await agent.wait())["counts"] == {"DONE": 3}
    assert sorted(log.read_text().split()) == ["1", "2", "3"]
    assert agent.calls == 4 and agent.tokens < 600


async def test_a_wait_that_the_client_gave_up_harms_nothing(agent: Traveller, gate: anyio.Path) -> None:
    await agent.create("local")
    await agent.submit({"name": "read", "executable": "/bin/cat", "arguments": [str(gate)]})
    wait = partial(agent.client.call_tool, "wait_tasks", {"session": agent.session})
    with pytest.raises(MCPError):
        await wait(read_timeout_seconds=0.5)
    with anyio.CancelScope() as scope:

        async def stop(progress: float, total: float | None, message: str | None) -> None:
            scope.cancel()

        await wait(progress_callback=stop)
    assert scope.cancelled_caught
    await gate.write_text("still there")
    while not ((await wait()).structured_content or {})["ended"]:
        pass  # after waits that were given up the next are short
    assert rows_by_name(await agent.wait())["read"]["result"] == "still there"
    assert agent.calls == 3 and agent.tokens < 400  # and those that were not counted


async def test_a_sweep_that_is_cancelled_half_way_keeps_what_had_ended(agent: Traveller) -> None:
    await agent.create("local")
    source = "def step(n):\n    import time\n\n    if n >= 10:\n        time.sleep(600)\n    return n"
    await agent.submit({"name": "steps", "source": source, "args": [{"item": True}], "for_each": list(range(30))})
    half = await agent.wait(count=10)
    assert not half["ended"] and half["counts"]["DONE"] == 10
    told = await agent.call("cancel_tasks", session=agent.session, tasks=["steps"], force=True)
    kept = await agent.result("steps")
    assert kept["result"] == [*range(10), *[None] * 20] and kept["counts"] == {"DONE": 10, "CANCELED": 20}
    assert told == {"canceled": 20, "had_ended": 10, "still_ending": []}
    assert agent.calls == 5 and agent.tokens < 1_800


async def test_a_person_is_asked_before_tasks_that_run_are_lost_and_may_say_no(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit({"name": "long", **SLEEPER})
    agent.person.heard.clear()
    agent.person.answers += [ElicitResult(action="decline"), ElicitResult(action="accept", content={})]
    refused = await agent.refusal("close_session", session=agent.session)
    assert refused.startswith("not_confirmed: the person was asked and said no")
    closed = await agent.call("close_session", session=agent.session)
    assert closed["canceled"] == 1
    assert len(agent.person.heard) == 2 and "(long)" in agent.person.heard[0]
    assert agent.calls == 4 and agent.tokens < 400


@IN_ONE_ERA
async def test_a_wait_for_a_slow_engine_ends_at_its_bound_and_the_next_shows_only_what_is_new(agent: Traveller) -> None:
    with anyio.fail_after(600):
        await agent.create("dragon", "local")
        await agent.submit(
            {"name": "slow", "function": "builtins:abs", "args": [-1]},
            {"name": "quick", "function": "builtins:abs", "args": [-2], "backend": "local"},
        )
        first = await agent.wait(timeout_s=0.3)
        second = await agent.wait(cursor=first["cursor"])
    assert not first["ended"] and first["engines"]["dragon"] == "starting" and "slow QUEUED" in first["open"][0]
    assert second["ended"] and second["engines"]["dragon"] == "ready"
    assert [*rows_by_name(first), *rows_by_name(second)] == ["quick", "slow"]
    assert agent.calls == 4 and agent.tokens < 900
