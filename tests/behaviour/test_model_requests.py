"""What agents ask of models: chats, texts that hold results, and sampling of each item's own."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.model.specs import Completion, Message
from rhapsody_mcp.model.values import Ref
from rhapsody_mcp.settings import Settings
from tests.agents import Agent, open_agent

pytestmark = pytest.mark.anyio
MADE = {"name": "made", "source": "def made():\n    return {'x': 0.5, 'names': ['a', 'b']}"}


async def submit(agent: Agent, *tasks: dict[str, Any]) -> None:
    await agent.call("submit_tasks", session="session-1", tasks=list(tasks))
    assert (await agent.call("wait_tasks", session="session-1", timeout_s=50))["ended"]


async def result(agent: Agent, task: str) -> Any:
    return (await agent.call("get_result", session="session-1", task=task))["result"]


async def refusal(agent: Agent, *tasks: dict[str, Any]) -> str:
    return await agent.refusal("submit_tasks", session="session-1", tasks=list(tasks))


def asked(agent: Agent) -> list[Completion]:
    """What prompts the backend was given, in order."""
    works = [order.spec.work for order in agent.backend.received]
    return [work for work in works if isinstance(work, Completion)]


async def test_a_result_stands_in_the_texts_of_prompts(agent: Agent) -> None:
    prompts = ["x is {ref:made/x}", "all: {ref: made}", "{{ref:made}} stays", "{ref:made/names/1}"]
    await submit(agent, {"name": "told", "prompt": prompts, "system_prompt": "{ref:made/x}"}, MADE)
    whole = '{"x":0.5,"names":["a","b"]}'
    told = ["x is 0.5", f"all: {whole}", "{ref:made} stays", "b"]
    assert await result(agent, "told") == [f"answer to {text}" for text in told]
    assert asked(agent)[0].system_prompt == (Ref("task.000002", "/x"),)


async def test_a_chat_holds_references_in_its_contents(agent: Agent) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": {"ref": "first"}},
        {"role": "user", "content": "Again: {ref:first}"},
    ]
    await submit(agent, {"name": "first", "prompt": "hi"}, {"name": "chat", "messages": messages})
    assert await result(agent, "chat") == "answer to Again: answer to hi"
    first = Ref("task.000001")
    wanted = (Message("system", "Be brief."), Message("assistant", first), Message("user", ("Again: ", first)))
    assert asked(agent)[1].messages == wanted


async def test_items_stand_in_messages_and_in_any_field_of_the_sampling(agent: Agent) -> None:
    items = [{"t": 0.5, "seed": 7, "stop": ["a"], "model": "m1"}, {"t": 1, "seed": 8, "stop": ["b"], "model": "m2"}]
    sweep = {
        "messages": [{"role": "user", "content": "Draw {item/seed}."}],
        "model": "{item/model}",
        "temperature": {"item": True, "path": "/t"},
        "seed": {"item": True, "path": "/seed"},
        "stop_sequences": {"item": True, "path": "/stop"},
        "for_each": items,
    }
    await submit(
        agent, {"name": "sweep", **sweep}, {"name": "drawn", "prompt": "x", "n": {"item": True}, "for_each": [2]}
    )
    assert await result(agent, "sweep") == ["answer to Draw 7.", "answer to Draw 8."]
    first, second, drawn = asked(agent)
    assert (first.model, first.temperature, first.seed, first.stop_sequences) == ("m1", 0.5, 7, ("a",))
    assert (second.model, second.temperature, second.seed, second.stop_sequences) == ("m2", 1.0, 8, ("b",))
    assert drawn.n == 2


async def test_items_of_a_result_set_the_sampling_and_a_result_is_a_value(agent: Agent) -> None:
    await submit(
        agent,
        {"name": "seeds", "source": "def seeds():\n    return [3, 4]"},
        {"name": "sweep", "prompt": "x", "seed": {"item": True}, "for_each": {"ref": "seeds"}},
        {"prompt": "x", "temperature": {"ref": "made", "path": "/x"}},
        MADE,
    )
    seeds = [work.seed for work in asked(agent) if work.seed is not None]
    assert seeds == [3, 4] and Ref("task.000004", "/x") in [work.temperature for work in asked(agent)]


async def test_what_an_item_says_is_no_reference(agent: Agent) -> None:
    items = ["{ref:made}", "{item}"]
    await submit(agent, MADE, {"name": "told", "prompt": "{item} of {ref:made/x}", "for_each": items})
    assert await result(agent, "told") == ["answer to {ref:made} of 0.5", "answer to {item} of 0.5"]


async def test_a_schema_may_have_a_property_of_the_name_of_a_stand_in(agent: Agent) -> None:
    schema = {"type": "object", "properties": {"item": True, "ref": {"type": "string"}}}
    await submit(agent, {"prompt": "x", "json_schema": schema})
    assert "nothing stands for the item" in await refusal(
        agent, {"prompt": "x", "json_schema": schema, "for_each": [1, 2]}
    )


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"prompt": "{ref:mad}"}, "unknown task 'mad' (did you mean 'made'?)"),
        ({"prompt": "{ref:}"}, "unknown task ''"),
        ({"prompt": "{ref:made/z}"}, "path '/z' leads nowhere: at 'z' there is a dict with keys ['x', 'names']"),
        ({"prompt": "x", "seed": {"item": True}}, "stand for an item of for_each, which is not given"),
        ({"prompt": "x", "seed": {"ref": "mad"}}, "unknown task 'mad'"),
        ({"prompt": "x", "seed": {"item": True}, "for_each": ["a"]}, "item 0: seed is 'a'; valid is a whole number"),
        ({"prompt": "x", "seed": {"of": 1}}, "seed must be a whole number of at least 0"),
        ({"prompt": "x", "temperature": 3}, "temperature must be at most 2"),
        ({"prompt": "x", "n": 129}, "n must be at most 128"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "it has prompt and messages"),
        ({"messages": [{"role": "user", "content": "x"}], "system_prompt": "s"}, "it belongs to one with prompt"),
        ({"messages": [{"role": "user", "text": "x"}]}, "a message has 'text'; it has role and content alone"),
        ({"prompt": "x", "logprobs": True}, "logprobs must be a number from 0 to 20, not true"),
        ({"prompt": "x", "stop_sequences": ["a", 3]}, "stop_sequences[1] must be a text, not 3"),
        ({"prompt": "x", "seed": "{item}", "for_each": [1]}, 'a whole number of at least 0, or {"item": true}, not'),
        ({"prompt": "x", "value": 3}, "tasks[0] has no field 'value'"),
        ({"function": "math:sqrt", "env": {"value": []}}, "tasks[0].env.value must be a text"),
        ({"prompt": "{ref:made/names/9}"}, "of the result of made, path '/names/9' leads nowhere"),
        ({"messages": [{"role": "User", "content": "x"}]}, 'valid: "system", "user", "assistant"'),
    ],
)
async def test_what_is_wrong_is_refused_in_words(agent: Agent, task: dict[str, Any], words: str) -> None:
    await submit(agent, MADE)
    assert words in await refusal(agent, task)


async def test_texts_of_json_stay_prompts(agent: Agent) -> None:
    await submit(agent, {"name": "told", "prompt": '["a", "b"]'})
    assert await result(agent, "told") == 'answer to ["a", "b"]'


async def test_a_result_stands_in_the_texts_of_arguments_too(agent: Agent) -> None:
    program = {"executable": "train", "arguments": ["--lr={ref:made/x}", "{{ref:made}}", "{item}:{ref:made/names}"]}
    await submit(agent, MADE, {"name": "run", **program, "for_each": ["{ref:made}"]})
    assert await result(agent, "run") == ['train --lr=0.5 {ref:made} {ref:made}:["a","b"]']


@pytest.mark.parametrize("text", ["{ref:made/x}", "{ref:nobody}", "{ref: made/names/0}"])
async def test_a_text_that_takes_no_result_is_told_of(agent: Agent, text: str) -> None:
    for task in ({"function": "builtins:str", "args": [text]}, {"prompt": "x", "stop_sequences": [text]}):
        reply = await agent.call("submit_tasks", session="session-1", tasks=[task], dry_run=True)
        assert f"the text {text} stays as it is" in reply["problems"][0]
    meant = {"function": "builtins:str", "args": [{"literal": text}]}
    assert not (await agent.call("submit_tasks", session="session-1", tasks=[meant], dry_run=True))["problems"]


async def test_an_item_can_be_a_model_a_system_prompt_and_the_messages(agent: Agent) -> None:
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        {"role": "user", "content": "c"},
    ]
    await submit(
        agent,
        {"prompt": "x", "model": {"item": True}, "system_prompt": {"ref": "first"}, "for_each": ["m1"]},
        {"messages": {"item": True}, "for_each": chats},
        {"name": "first", "prompt": "hi"},
    )
    works = {(work.model, work.system_prompt, work.messages) for work in asked(agent)}
    assert ("m1", Ref("task.000003"), ()) in works
    assert (None, None, (Message("user", "a"), Message("assistant", "b"))) in works
    assert (None, None, (Message("user", "c"),)) in works


async def test_where_tokens_are_limited_their_number_must_be_known() -> None:
    by_a_result = {"prompt": "x", "max_tokens": {"ref": "made", "path": "/x"}, "n": {"ref": "made", "path": "/x"}}
    async with open_agent(settings=Settings(max_session_tokens=100)) as agent:
        await agent.session()
        told = await refusal(agent, MADE, by_a_result)
        assert (
            "max_tokens must be a number here, because the tokens of a session are limited (max_session_tokens" in told
        )
    async with open_agent(settings=Settings(max_answer_tokens=100)) as agent:
        await agent.session()
        await submit(agent, MADE, {"prompt": "x", "max_tokens": {"item": True}, "for_each": [50, 100]}, by_a_result)
        assert asked(agent)[-1].most_tokens == 100 or asked(agent)[0].most_tokens == 100
        assert "max_tokens is 101; the most here is 100" in await refusal(
            agent, {"prompt": "x", "max_tokens": {"item": True}, "for_each": [101]}
        )


async def test_every_answer_of_n_counts_against_the_limits_of_a_session() -> None:
    async with open_agent(settings=Settings(max_session_tokens=100, max_session_prompts=20)) as agent:
        await agent.session()
        chat = [{"role": "user", "content": "x"}]
        await submit(agent, {"messages": chat, "max_tokens": 10, "n": 10})
        assert "max_session_tokens" in await refusal(agent, {"prompt": "x", "max_tokens": 1})
    async with open_agent(settings=Settings(max_session_prompts=20)) as agent:
        await agent.session()
        assert "max_session_prompts" in await refusal(agent, {"prompt": ["x", "y", "z"], "n": 7})
