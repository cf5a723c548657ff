"""The names that replies give to the tasks of a for_each can be used wherever a task is named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

EACH = {"name": "each", "function": "builtins:abs", "args": [{"item": True}], "for_each": [-5, -6, -7]}
USES = [
    {"name": "ref", "function": "builtins:int", "args": [{"ref": "each[1]"}]},
    {"name": "after", "function": "builtins:int", "after": ["each[1]"]},
    {"name": "text", "executable": "echo", "arguments": ["{ref:each[1]}"]},
    {"name": "when", "function": "builtins:int", "when": {"ref": "each[1]", "above": 5}},
    {"name": "times", "function": "builtins:abs", "args": [{"item": True}], "for_each": {"ref": "list[0]"}},
    {"name": "list", "function": "builtins:list", "args": [[{"item": True}]], "for_each": [3]},
]


async def results(agent: Agent, session: str) -> dict[str, Any]:
    reply = await agent.call("wait_tasks", session=session)
    assert reply["failures"] == []
    return {row["name"]: row.get("result") for row in reply["done"]}


@pytest.mark.parametrize("first", [[], [EACH]])
async def test_in_the_same_call_and_in_a_later_one(first: list[dict[str, Any]], tmp_path: Path) -> None:
    gate = ScriptedBackend(perform)
    gate.may_start.clear()
    expected = {"ref": 6, "after": 0, "text": "echo 6", "when": 0, "times": [3], "list": [[3]], "each": [5, 6, 7]}
    life = partial(open_agent, ledger=tmp_path)
    async with life(backend=gate) as agent:
        session = await agent.session()
        for tasks in filter(None, (first, [*USES, *([] if first else [EACH])])):
            await agent.call("submit_tasks", session=session, tasks=tasks)
    async with life() as agent:  # also where the service ended before they started
        assert await results(agent, session) == expected


async def test_wait_get_and_cancel_take_them() -> None:
    gate = ScriptedBackend(perform)
    gate.may_finish.clear()
    async with open_agent(backend=gate) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[EACH])
        assert (await agent.call("cancel_tasks", session=session, tasks=["each[2]"]))["canceled"] == 1
        gate.may_finish.set()
        reply = await agent.call("wait_tasks", session=session, tasks=["each[0]", "each[2]"])
        assert reply["counts"] == {"DONE": 1, "CANCELED": 1}
        assert (await agent.call("get_result", session=session, task="each[0]"))["result"] == 5


async def test_an_item_that_is_not_there_is_refused_with_those_that_are() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        wrong = {"function": "builtins:int", "after": ["each[3]"]}
        text = await agent.refusal("submit_tasks", session=session, tasks=[EACH, wrong])
        assert "each[0] to each[2]" in text
        later = EACH | {"name": "later", "for_each": {"ref": "each"}}
        wrong = {"function": "builtins:int", "after": ["later[0]"]}
        text = await agent.refusal("submit_tasks", session=session, tasks=[EACH, later, wrong])
        assert "before later has started" in text and "in after to later" in text
        circle = EACH | {"after": ["x"]}
        text = await agent.refusal(
            "submit_tasks",
            session=session,
            tasks=[circle, {"name": "x", "function": "builtins:int", "after": ["each[0]"]}],
        )
        assert "circle" in text


async def test_tasks_that_stand_in_any_order_in_a_call_outlive_the_service(tmp_path: Path) -> None:
    gate = ScriptedBackend(perform)
    gate.may_start.clear()
    chain = [
        {"name": f"t{number}", "function": "builtins:abs", "args": [{"ref": f"t{number + 1}"}]} for number in range(20)
    ]
    last = {"name": "t20", "function": "builtins:abs", "args": [-4]}
    async with open_agent(backend=gate, ledger=tmp_path) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[*chain, last])
    async with open_agent(ledger=tmp_path) as agent:
        assert set((await results(agent, session)).values()) == {4}
