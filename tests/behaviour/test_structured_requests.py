"""Prompts with a JSON schema, as an agent submits them."""

from __future__ import annotations

import json

import pytest

from rhapsody_mcp.model.specs import Completion
from tests.agents import Agent, open_agent

pytestmark = pytest.mark.anyio
SIZE = {"type": "object", "properties": {"size": {"type": "integer"}}}


async def test_an_agents_schema_reaches_the_backend() -> None:
    async with open_agent() as agent:
        tasks = [{"prompt": "hi", "json_schema": SIZE}, {"prompt": "{item}", "json_schema": SIZE, "for_each": [1, 2]}]
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=tasks)
        await agent.call("wait_tasks", session=session, timeout_s=50)
        assert [schema_of(agent, number) for number in range(3)] == [SIZE, SIZE, SIZE]


def schema_of(agent: Agent, number: int) -> object:
    work = agent.backend.received[number].spec.work
    assert isinstance(work, Completion) and isinstance(work.json_schema, bytes)
    return json.loads(work.json_schema)


async def test_a_wrong_schema_is_refused_with_the_name_of_its_task() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        wrong = {"name": "sized", "prompt": "hi", "json_schema": {"type": "int"}}
        refusal = await agent.refusal("submit_tasks", session=session, tasks=[wrong])
        assert "tasks[0] ('sized'): json_schema has type 'int'" in refusal


async def test_a_schema_has_no_effect_on_a_program_and_is_refused() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        wrong = {"executable": "/bin/true", "json_schema": SIZE}
        refusal = await agent.refusal("submit_tasks", session=session, tasks=[wrong])
        assert "json_schema has no effect on a task with executable" in refusal
