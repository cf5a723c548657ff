"""How a person gets a prompt, and help with what to fill in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError
from mcp.types import INVALID_PARAMS, PromptReference, ResourceTemplateReference, TextContent
from pydantic import ValidationError

from rhapsody_mcp.cards import Argument, PromptText, read_prompts
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.settings import Settings
from tests.agents import Agent, open_agent

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
TASK = ResourceTemplateReference(type="ref/resource", uri="rhapsody://sessions/{session}/tasks/{task}")
WHY = PromptReference(type="ref/prompt", name="why_tasks_failed")


async def submit(agent: Agent, *tasks: dict[str, Any]) -> None:
    await agent.call("submit_tasks", **SESSION, tasks=list(tasks))


async def text(agent: Agent, name: str, **arguments: str) -> str:
    (message,) = (await agent.client.get_prompt(name, arguments)).messages
    assert message.role == "user" and isinstance(message.content, TextContent)
    return message.content.text


async def refusal(agent: Agent, name: str, **arguments: str) -> str:
    with pytest.raises(MCPError) as refused:
        await text(agent, name, **arguments)
    assert refused.value.error.code == INVALID_PARAMS
    return refused.value.error.message


async def test_a_prompt_has_what_was_given_in_its_places(agent: Agent) -> None:
    goal = "add {session} to {item} and {goal}"
    given = await text(agent, "build_pipeline", goal=goal, session="session-1")
    assert f"run it on the machine: {goal}\n" in given and "Session: session-1." in given
    assert "`{item}` for it inside a text" in given


async def test_an_argument_that_is_left_out_has_its_default(agent: Agent) -> None:
    for left_out in ({}, {"session": ""}):
        assert "Session: a new one: call `create_session`" in await text(agent, "build_pipeline", goal="g", **left_out)


async def test_every_prompt_is_filled_from_its_required_arguments(agent: Agent) -> None:
    for prompt in (await agent.client.list_prompts()).prompts:
        required = {argument.name for argument in prompt.arguments or () if argument.required}
        given = {name: "session-1" if name == "session" else "this" for name in required}
        filled = await text(agent, prompt.name, **given)
        assert all(f"{{{argument.name}}}" not in filled for argument in prompt.arguments or ())


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("build_pipline", {}, "unknown prompt 'build_pipline' (did you mean 'build_pipeline'?)"),
        ("build_pipeline", {}, "build_pipeline needs goal: What the pipeline shall do"),
        ("build_pipeline", {"goal": " "}, "build_pipeline needs goal"),
        ("build_pipeline", {"goal": "g", "sesion": "s"}, "unknown argument 'sesion' (did you mean 'session'?)"),
        ("build_pipeline", {"goal": "g", "session": "sesion-1"}, "Call list_sessions to see what is open"),
        ("why_tasks_failed", {"session": "session-1", "task": "trian"}, "unknown_task: "),
    ],
)
async def test_wrong_arguments_are_refused_in_words(
    agent: Agent, name: str, arguments: dict[str, str], told: str
) -> None:
    await submit(agent, {"name": "train", "prompt": "x"})
    assert told in await refusal(agent, name, **arguments)


async def complete(agent: Agent, ref: Any, name: str, value: str, **given: str) -> list[str]:
    result = await agent.client.complete(ref, {"name": name, "value": value}, given or None)
    return result.completion.values


async def test_ids_of_sessions_are_completed(agent: Agent) -> None:
    await agent.call("create_session", name="sweep")
    for ref in (TASK, WHY):
        assert await complete(agent, ref, "session", "") == ["session-1", "sweep"]
        assert await complete(agent, ref, "session", "sw") == ["sweep"]
    assert await complete(agent, WHY, "session", "ION-1") == ["session-1"]


async def test_names_and_ids_of_tasks_are_completed_in_the_session_that_was_given(agent: Agent) -> None:
    await submit(agent, {"name": "train", "prompt": "x"}, {"name": "retrain", "prompt": "x"}, {"prompt": "x"})
    for ref in (TASK, WHY):
        assert await complete(agent, ref, "task", "tr", **SESSION) == ["train", "retrain"]
        assert await complete(agent, ref, "task", "task.", **SESSION) == [f"task.00000{n}" for n in (1, 2, 3)]
    assert await complete(agent, TASK, "task", "tra") == ["train", "retrain"]
    await agent.call("create_session", name="other")
    assert await complete(agent, TASK, "task", "tra", session="other") == []
    assert await complete(agent, TASK, "task", "tra", session="no such") == []
    assert await complete(agent, TASK, "task", "tra") == []


async def test_of_many_tasks_a_bounded_number_is_offered(agent: Agent) -> None:
    await submit(agent, *({"name": f"sim-{number}", "prompt": "x"} for number in range(150)))
    result = (await agent.client.complete(TASK, {"name": "task", "value": "sim-"}, SESSION)).completion
    assert (len(result.values), result.total, result.has_more) == (100, 150, True)


async def test_what_cannot_be_completed_gives_nothing_and_what_is_not_there_is_refused(agent: Agent) -> None:
    assert await complete(agent, PromptReference(type="ref/prompt", name="build_pipeline"), "goal", "a") == []
    for ref, name, told in (
        (PromptReference(type="ref/prompt", name="why_task_failed"), "session", "did you mean 'why_tasks_failed'?"),
        (ResourceTemplateReference(type="ref/resource", uri="rhapsody://{x}"), "x", "unknown resource template"),
        (TASK, "tsk", "unknown argument 'tsk' (did you mean 'task'?)"),
    ):
        with pytest.raises(MCPError) as refused:
            await complete(agent, ref, name, "")
        assert refused.value.error.code == INVALID_PARAMS and told in refused.value.error.message


async def test_a_server_that_only_reads_offers_only_prompts_that_need_no_more() -> None:
    async with open_agent(settings=Settings(read_only=True)) as agent:
        names = [prompt.name for prompt in (await agent.client.list_prompts()).prompts]
        assert names == ["read_statistics", "why_tasks_failed"]


def prompt_text(**fields: Any) -> PromptText:
    complete = {"name": "p", "title": "P", "description": "d", "needs": (), "arguments": (), "text": "do it"}
    return PromptText(**{**complete, **fields})


async def test_an_argument_without_a_place_and_a_place_without_an_argument_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"\{goal\} is not both an argument and a place in the text"):
        prompt_text(arguments=(Argument(name="goal", description="d"),))
    with pytest.raises(ValidationError, match=r"\{gaol\} is not both"):
        prompt_text(text="do {gaol}")
    assert prompt_text(text='for each {item}, {"ref": "x"}').filled({}) == 'for each {item}, {"ref": "x"}'


@pytest.mark.parametrize("content", ["no front matter", "---\ntitle: [\n---\ntext", "---\ntitle: T\n---\ntext"])
async def test_a_malformed_prompt_stops_the_server_and_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "stray.md").write_text(content, encoding="utf-8")
    with pytest.raises(RhapsodyError, match=r"the prompt prompts/stray.md is malformed"):
        read_prompts(tmp_path)
