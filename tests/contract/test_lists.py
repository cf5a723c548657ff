"""What a client is offered besides tools: prompts and resources, and everything that a prompt says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rhapsody_mcp.cards import PromptText, read_prompts
from tests.agents import ERAS, open_agent, wire
from tests.contract.test_cards import VALUES, fields, names, offered

pytestmark = pytest.mark.anyio

SNAPSHOTS = Path(__file__).parent / "snapshots" / "lists"
PROMPTS = [pytest.param(prompt, id=prompt.name) for prompt in read_prompts()]
#: Words in code spans of prompts that are neither tools nor parameters, but fields of replies.
REPLIED = {"ended"}


@pytest.mark.parametrize("era", ERAS)
async def test_prompts_and_resources_look_on_the_wire_as_their_snapshots(era: str) -> None:
    async with open_agent(era) as agent:
        lists: dict[str, Sequence[BaseModel]] = {
            "prompts": (await agent.client.list_prompts()).prompts,
            "resources": (await agent.client.list_resources()).resources,
            "resource_templates": (await agent.client.list_resource_templates()).resource_templates,
        }
    forms = {
        name: [item.model_dump(mode="json", by_alias=True, exclude_none=True) for item in items]
        for name, items in lists.items()
    }
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        for name, form in forms.items():
            (SNAPSHOTS / f"{name}.json").write_text(wire(form), encoding="utf-8")
    assert {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in SNAPSHOTS.glob("*.json")} == forms


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_every_name_in_a_prompt_exists(prompt: PromptText) -> None:
    tools = await offered()
    tool_names = {tool.name for tool in tools}
    known = VALUES | REPLIED | tool_names | {name for tool in tools for name in fields(tool.input_schema)}
    defaults = " ".join(argument.default or "" for argument in prompt.arguments)
    told = set(names(f"{prompt.text} {defaults}"))
    assert told - known == set()
    assert set(prompt.needs) <= tool_names & told


async def test_prompts_are_short() -> None:
    assert all(len(prompt.text) < 3000 for prompt in read_prompts())


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("prompt", PROMPTS)
async def test_the_tasks_that_a_prompt_shows_run(prompt: PromptText, era: str) -> None:
    shown: list[list[dict[str, Any]]] = [
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", prompt.text, re.S)
    ]
    assert shown or "submit_tasks" not in prompt.needs
    async with open_agent(era) as agent:
        await agent.session()
        for tasks in shown:
            await agent.call("submit_tasks", session="session-1", tasks=tasks)
            waited = await agent.call("wait_tasks", session="session-1")
            assert waited["ended"] and set(waited["counts"]) == {"DONE"}
