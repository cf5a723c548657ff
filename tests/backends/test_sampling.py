"""What a prompt says of its answers: how many, with which tokens, as part of which conversation."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, Part, Session, Text
from rhapsody_mcp.backends.endpoint import EndpointInferenceBackend
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import TaskFailed
from rhapsody_mcp.runtime.tasks import Task
from tests.backends.openai_stand_in import StandIn

pytestmark = pytest.mark.anyio
SCHEMA = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}


@pytest.fixture
async def session(server: StandIn) -> AsyncIterator[Session]:
    async with Session([EndpointInferenceBackend(server.url)]) as opened:
        yield opened


async def run(session: Session, *tasks: Task) -> list[Any]:
    await session.submit_tasks(tasks)
    return [(await task).return_value for task in tasks]


# --- several answers


async def test_with_n_each_prompt_has_a_list_of_answers(session: Session, server: StandIn) -> None:
    one, several, many = await run(session, AITask("a", n=1), AITask("a", n=3), AITask(["a", "b"], n=2))
    assert (one, several) == (["answer to a"], ["answer to a"] * 3)
    assert many == [["answer to a"] * 2, ["answer to b"] * 2]
    assert [body.get("n") for body in server.bodies] == [None, 3, 2, 2]  # a request each: no batch takes an n


async def test_answers_of_n_count_their_tokens_once(session: Session) -> None:
    task = AITask("ab", n=4, max_tokens=5)
    await run(session, task)
    assert task.outcome is not None and task.outcome.usage is not None
    assert (task.outcome.usage.prompt_tokens, task.outcome.usage.completion_tokens) == (2, 20)
    assert task.notes == ("4 of 4 answers were cut off at max_tokens or the model's length",)


async def test_n_answers_are_each_held_to_the_schema(session: Session, server: StandIn) -> None:
    server.answer = lambda _: '{"size": 1}'
    assert await run(session, AITask("a", n=2, json_schema=SCHEMA)) == [[{"size": 1}, {"size": 1}]]
    server.answer = lambda prompt: '{"size": %s}' % ("1" if prompt == "good" else '"x"')
    with pytest.raises(TaskFailed, match="answer 1 of 2 to prompt 2 of 2 does not fit json_schema"):
        await run(session, AITask(["good", "bad"], n=2, json_schema=SCHEMA))


# --- log probabilities


async def test_logprobs_give_the_tokens_with_the_likeliest_ones(session: Session, server: StandIn) -> None:
    server.answer = lambda _: "ab"
    none, two, batch = await run(
        session, AITask("x", logprobs=0), AITask("x", logprobs=2, n=2), AITask(["x", "y"], logprobs=1)
    )
    assert none == {"text": "ab", "logprobs": [token("a", 0), token("b", 0)]}
    assert two == [{"text": "ab", "logprobs": [token("a", 2), token("b", 2)]}] * 2
    assert batch == [{"text": "ab", "logprobs": [token("a", 1), token("b", 1)]}] * 2


def token(letter: str, most: int) -> dict[str, Any]:
    likely = [{"token": letter, "logprob": -0.5}, {"token": "?", "logprob": -1.5}]
    return {**likely[0], "top_logprobs": likely[:most]}


async def test_a_server_that_gives_no_logprobs_fails_the_task_in_words(session: Session, server: StandIn) -> None:
    server.gives_logprobs = False
    with pytest.raises(TaskFailed, match="the server gave no logprobs"):
        await run(session, AITask("x", logprobs=0))


# --- conversations, and texts that hold results


async def test_messages_are_sent_as_they_are_with_results_in_their_places(session: Session, server: StandIn) -> None:
    first = AITask("hi", name="first")
    chat = AITask(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": Text("You said: ", first, "?")},
        ]
    )
    _, answer = await run(session, first, chat)
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "answer to hi"},
        {"role": "user", "content": "You said: answer to hi?"},
    ]
    assert answer == "answer to You said: answer to hi?"


async def test_a_history_of_messages_can_be_a_result(session: Session, server: StandIn) -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    server.answer = lambda prompt: json.dumps({"told": history, "one": history[0]}) if prompt == "tell" else prompt
    told = AITask("tell", json_schema={"type": "object"})
    last = {"role": "user", "content": "c"}
    await run(session, told, AITask(messages=[Part(told, "/told"), Part(told, "/one"), last]))
    assert server.bodies[-1]["messages"] == [*history, history[0], last]
    with pytest.raises(TaskFailed, match="the role of a message is None; valid"):
        await run(session, AITask(messages=told))


async def test_results_in_a_text_are_text_or_json(session: Session, server: StandIn) -> None:
    server.answer = lambda prompt: '{"size": 3}' if prompt == "measure" else prompt
    sized = AITask("measure", json_schema=SCHEMA)
    told = AITask([Text("size ", Part(sized, "/size"), " of ", sized), "plain"], system_prompt=Text("<", sized, ">"))
    assert await run(session, sized, told) == [{"size": 3}, ['size 3 of {"size":3}', "plain"]]
    assert server.bodies[-1]["messages"][0][0] == {"role": "system", "content": '<{"size":3}>'}


# --- values that other tasks give


async def test_a_sampling_value_can_be_another_tasks_result(session: Session, server: StandIn) -> None:
    server.answer = lambda prompt: '{"size": 1}' if prompt == "choose" else prompt
    chosen = AITask("choose", json_schema=SCHEMA)
    await run(session, chosen, AITask("x", temperature=Part(chosen, "/size"), max_tokens=Part(chosen, "/size")))
    assert (server.bodies[-1]["temperature"], server.bodies[-1]["max_tokens"]) == (1.0, 1)


async def test_a_result_that_is_no_valid_value_fails_the_task_that_uses_it(session: Session) -> None:
    first = AITask("hi")
    with pytest.raises(TaskFailed, match=re.escape("seed is 'answer to hi'; valid is a whole number from 0 to")):
        await run(session, first, AITask("x", seed=first))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x", "n": 0}, "n is 0; valid is a whole number from 1 to 128"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21; valid is a whole number from 0 to 20"),
        ({"prompt": "x", "logprobs": 0, "json_schema": SCHEMA}, "logprobs and json_schema contradict each other"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages and prompt contradict each other"),
        ({"system_prompt": "s", "messages": [{"role": "user", "content": "x"}]}, "messages and system_prompt"),
        ({"messages": []}, 'messages is []; valid is a list such as [{"role": "user", "content": "..."}]'),
        ({"messages": ["x"]}, 'messages holds a str; valid is one such as {"role": "user", "content": "..."}'),
        ({"messages": [{"role": "user"}]}, "a message has no content; valid is one such as"),
        (
            {"messages": [{"role": "user", "content": "x", "name": "n"}]},
            "a message has 'name'; it has role and content",
        ),
        ({"prompt": "x", "model": ""}, "model is ''; valid is a text"),
        ({"messages": [{"role": "me", "content": "x"}]}, 'role of a message is \'me\'; valid: "system", "user"'),
        ({"messages": [{"role": "user", "content": " "}]}, "the content of a message is empty"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "content is a int; valid is a text, or a task that stands for its result. Texts alone",
        ),
        ({"prompt": [{"role": "user", "content": "x"}]}, "give the messages of a chat as messages"),
        ({"prompt": Text("a", 3)}, "prompt is a int; valid is a text, or a task that stands for its result, or a list"),
        ({}, "prompt is a NoneType; valid is a text, or a task that stands for its result, or a list of these."),
    ],
)
async def test_what_cannot_be_asked_for_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidTask, match=re.escape(words)):
        AITask(**fields)
