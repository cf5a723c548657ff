"""Prompts whose answers are held to a JSON schema, on a server that keeps to it and on one that does not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, Session
from rhapsody_mcp.backends.endpoint import EndpointInferenceBackend
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.states import Cause, TaskState
from tests.backends.openai_stand_in import Refusal, StandIn, serve

pytestmark = pytest.mark.anyio
WITHIN_S = 600

SIZE = {"type": "object", "properties": {"size": {"type": "integer", "minimum": 0}}, "required": ["size"]}
PAIR = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "null"}}, "required": ["b", "a"]}
TURNED = {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "string"}}, "required": ["b", "a"]}


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with serve(StandIn()) as stand_in:
        stand_in.answer = lambda prompt: json.dumps({"size": len(prompt)})
        yield stand_in


@pytest.fixture
async def session(server: StandIn) -> AsyncIterator[Session]:
    async with Session([EndpointInferenceBackend(server.url)]) as opened:
        yield opened


async def run(session: Session, *tasks: AITask) -> None:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, WITHIN_S)


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """The schema of a request."""
    asked_for: dict[str, Any] = body["response_format"]["json_schema"]["schema"]
    return asked_for


# --- what goes out and what comes back


async def test_a_prompt_gives_the_object_and_a_list_gives_a_list_of_objects(session: Session) -> None:
    one, several = AITask("abc", json_schema=SIZE), AITask(["a", "ab"], json_schema=SIZE)
    await run(session, one, several)
    assert one.return_value == one.response == {"size": 3}
    assert several.return_value == [{"size": 1}, {"size": 2}]


async def test_an_object_is_json_that_other_tasks_and_agents_can_read(session: Session) -> None:
    task = AITask("abc", json_schema=SIZE)
    await run(session, task)
    assert task.outcome is not None and task.outcome.value is not None
    assert (task.outcome.value.format, task.outcome.value.data) == ("json", b'{"size":3}')


async def test_the_schema_is_sent_as_it_is_in_the_words_of_openai(session: Session, server: StandIn) -> None:
    await run(session, AITask("hi", json_schema=SIZE))
    answer = {"name": "answer", "schema": SIZE, "strict": True}
    assert server.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": answer}


async def test_prompts_share_a_batch_only_with_the_same_schema_in_the_same_order(
    session: Session, server: StandIn
) -> None:
    server.answer = lambda prompt: '{"b": "", "a": null}'
    tasks = [AITask(f"p{number}", json_schema=schema) for number, schema in enumerate([PAIR, TURNED, PAIR, TURNED])]
    await run(session, *tasks, AITask("free"))
    assert {task.state for task in tasks} == {TaskState.DONE}
    assert sorted(server.sizes) == [1, 2, 2]
    assert [list(asked(body)["properties"]) for body in server.bodies[:2]] == [["b", "a"], ["a", "b"]]


async def test_a_server_without_the_batch_address_gets_the_schema_with_single_prompts(
    session: Session, server: StandIn
) -> None:
    server.no_batches = 404
    task = AITask(["a", "ab"], json_schema=SIZE)
    await run(session, task)
    assert task.return_value == [{"size": 1}, {"size": 2}]
    assert [asked(body) for body in server.bodies] == [SIZE, SIZE, SIZE]


async def test_a_batch_address_that_refuses_schemas_is_done_without(session: Session, server: StandIn) -> None:
    server.no_batches = 400
    tasks = [AITask("a", json_schema=SIZE), AITask("ab", json_schema=SIZE)]
    await run(session, *tasks)
    assert [task.return_value for task in tasks] == [{"size": 1}, {"size": 2}]


# --- what is no whole object


async def test_a_cut_answer_fails_the_task_and_says_which_where_and_what_to_do(
    session: Session, server: StandIn
) -> None:
    server.answer = lambda prompt: json.dumps({"size": int(prompt)})
    task = AITask(["1", "123456", "2", "1234567"], json_schema=SIZE, max_tokens=12)
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.ERROR)
    assert str(task.exception) == (
        f"{task.uid}: the answer to prompt 2 of 4 was cut at max_tokens (12) before its object was whole. "
        "Raise max_tokens, or let json_schema bound what can be long, with maxLength and maxItems."
    )
    assert task.outcome is not None and task.outcome.usage is not None
    assert task.outcome.usage.completion_tokens == 11 + 12 + 11 + 12


async def test_a_cut_answer_to_a_lone_prompt_fails_even_where_its_text_is_an_object(
    session: Session, server: StandIn
) -> None:
    server.answer = lambda prompt: '{"size": 1} and more'
    task = AITask("hi", json_schema=SIZE, max_tokens=11)
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.ERROR)
    assert "the answer was cut at max_tokens (11)" in str(task.exception)


async def test_without_a_schema_a_cut_answer_is_a_result_with_a_note(session: Session) -> None:
    task = AITask(["abc", "ab"], max_tokens=3)
    await run(session, task)
    assert (task.state, task.return_value) == (TaskState.DONE, ['{"s', '{"s'])
    assert task.notes == ("2 of 2 answers were cut off at max_tokens or the model's length",)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Sure! Here it is", "the answer is no JSON (JSON is malformed: invalid character (byte 0)). It begins: Sure!"),
        ('{"size": NaN}', 'is no JSON (JSON is malformed: invalid character (byte 9)). It begins: {"size": NaN}'),
        ("", "the answer is empty"),
        ("[1]", 'the answer does not fit json_schema: at $, [1] is not of type "object". It begins: [1]'),
        ('{"size": -1}', 'at $.size, -1 is less than the minimum of 0. It begins: {"size": -1}'),
        ('{"SIZE": 1}', 'at $, "size" is a required property. It begins: {"SIZE": 1}'),
    ],
)
async def test_an_answer_that_does_not_fit_fails_the_task_in_words_that_show_it(
    session: Session, server: StandIn, answer: str, said: str
) -> None:
    server.answer = lambda prompt: answer
    task = AITask("hi", json_schema=SIZE)
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.ERROR)
    assert said in str(task.exception)


async def test_of_a_long_answer_only_the_beginning_is_shown(session: Session, server: StandIn) -> None:
    server.answer = lambda prompt: "x" * 100_000
    task = AITask(["hi"], json_schema=SIZE)
    await run(session, task)
    assert len(str(task.exception)) < 400


# --- schemas that cannot be


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("size", "json_schema is a str; valid is a JSON schema of an object"),
        ({"type": "array"}, "json_schema has type 'array'; valid is a JSON schema of an object"),
        ({}, "json_schema has no type; valid is a JSON schema of an object"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, r'no JSON schema: at \$.properties.a.type, "text"'),
        (
            {"type": "object", "properties": {"a": {"pattern": "("}}},
            r'at \$.properties.a.pattern, "\(" is not a "regex"; valid is a regular expression without look-around',
        ),
        ({"type": "object", "$schema": 5}, r'at \$.\$schema, 5 is not of type "string"'),
        ({"type": "object", "default": object()}, "json_schema is not plain JSON: Encoding objects of type object"),
    ],
)
def test_a_wrong_schema_is_refused_in_words(schema: Any, said: str) -> None:
    with pytest.raises(InvalidTask, match=said):
        AITask("hi", json_schema=schema)


async def test_a_schema_that_the_server_refuses_fails_the_task_with_its_message(
    session: Session, server: StandIn
) -> None:
    def answer(prompt: str) -> str:
        raise Refusal(400, 'Unimplemented keys: ["if"]')

    server.answer = answer
    task = AITask("hi", json_schema=SIZE)
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.INVALID)
    assert 'Unimplemented keys: ["if"] (HTTP 400' in str(task.exception)


@pytest.mark.parametrize(
    ("place", "lacks"),
    [
        ("#/$defs/nothing", "Pointer '/$defs/nothing' does not exist"),
        ("http://127.0.0.1:9/elsewhere", "Resource 'http://127.0.0.1:9/elsewhere' is not present"),
    ],
)
def test_nothing_is_fetched_for_a_schema_and_what_it_lacks_is_named(place: str, lacks: str) -> None:
    with pytest.raises(InvalidTask) as refusal:
        AITask("hi", json_schema={"type": "object", "properties": {"size": {"$ref": place}}})
    assert lacks in str(refusal.value)
    assert str(refusal.value).endswith('Use "#/$defs/NAME".')


# --- schemas and answers that take long


def doubling(levels: int) -> dict[str, Any]:
    """A schema whose every level asks twice for the next."""
    named = {f"l{level}": {"allOf": [{"$ref": f"#/$defs/l{level + 1}"}] * 2} for level in range(levels)}
    return {"type": "object", "$ref": "#/$defs/l0", "$defs": {**named, f"l{levels}": {}}}


NESTED: dict[str, Any] = {"type": "object"}
for _ in range(400):
    NESTED = {"type": "object", "properties": {"a": NESTED}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "enum": ["x" * 70_000]}, "is 70,029 bytes as JSON; 65,536 is the most"),
        (
            {"type": "object", "patternProperties": {f"a{number}": {} for number in range(65)}},
            "has 65 patterns; 64 is the most",
        ),
        ({"type": "object", "patternProperties": {"((a{99}){99}){99}": {}}}, "valid is a regular expression without"),
        ({"type": "object", "properties": {"a": {"pattern": "(?=a)"}}}, "valid is a regular expression without"),
        (NESTED, "json_schema is nested too deeply"),
    ],
)
def test_a_schema_that_takes_long_to_read_is_refused_in_words(schema: Any, said: str) -> None:
    with pytest.raises(InvalidTask) as refusal:
        AITask("hi", json_schema=schema)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("schema", "answer", "fits"),
    [
        ({"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 28 + "!"}, False),
        ({"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 100_000}, True),
        ({"type": "object", "$ref": "#"}, {"a": 1}, True),
        ({"type": "object", "properties": {"a": {"allOf": [{"$ref": "#"}] * 2}}}, {"a": {"a": {"a": {}}}}, True),
        ({"type": "object", "properties": {"a": {"enum": list(range(10_000))}}}, {"a": 9_999}, True),
        ({"type": "object", "properties": {"a": {"uniqueItems": True}}}, {"a": list(range(100_000))}, True),
    ],
    ids=["pattern", "long", "itself", "itself twice", "enum", "unique"],
)
async def test_what_takes_other_validators_for_ever_is_checked(
    session: Session, server: StandIn, schema: Any, answer: Any, fits: bool
) -> None:
    server.answer = lambda prompt: json.dumps(answer)
    task = AITask("hi", json_schema=schema)
    await run(session, task)
    assert task.state is (TaskState.DONE if fits else TaskState.FAILED)
    assert task.return_value == answer if fits else "does not fit json_schema: at $.a" in str(task.exception)


async def test_a_check_that_takes_too_much_fails_its_task_alone(session: Session, server: StandIn) -> None:
    server.answer = lambda prompt: "{}"
    endless, simple = AITask("hi", json_schema=doubling(60)), AITask("hi", json_schema={"type": "object"})
    await session.submit_tasks([endless, simple])
    await session.wait_tasks([endless, simple], WITHIN_S)
    assert (endless.state, endless.cause) == (TaskState.FAILED, Cause.INVALID)
    assert "cannot be checked against the answer within 5 s of a core. Make it simpler" in str(endless.exception)
    assert (simple.state, simple.return_value) == (TaskState.DONE, {})


async def test_a_canceled_check_ends_and_the_next_one_is_done(session: Session, server: StandIn) -> None:
    server.answer = lambda prompt: "{}"
    endless, simple = AITask("hi", json_schema=doubling(60)), AITask("hi", json_schema={"type": "object"})
    await session.submit_tasks([endless])
    await server.until(lambda: len(server.bodies) == 1 and not server.at_work)
    await session.cancel(endless)
    await run(session, simple)
    assert (endless.state, simple.state) == (TaskState.CANCELED, TaskState.DONE)
