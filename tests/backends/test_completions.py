"""Prompts on their way to an OpenAI-compatible server, and their answers' way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.api import AITask, ComputeTask, Session
from rhapsody_mcp.backends.base import Ended, Event, Returned, Running
from rhapsody_mcp.backends.endpoint import EndpointInferenceBackend
from rhapsody_mcp.backends.inference.batching import Limits
from rhapsody_mcp.backends.inference.openai_client import ChatServer
from rhapsody_mcp.backends.inference.prompt_runner import Defaults, PromptRunner
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings, InvalidTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Completion, Layout, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value, load_json
from rhapsody_mcp.runtime.tasks import Part
from rhapsody_mcp.testing import ScriptedBackend
from tests.backends.openai_stand_in import Refusal, StandIn, conversations, serve

pytestmark = pytest.mark.anyio
LONG_MS = 1_000_000
WITHIN_S = 600  # every wait here is for an event; one that never comes fails the test


@pytest.fixture
async def session(server: StandIn) -> AsyncIterator[Session]:
    async with Session([EndpointInferenceBackend(server.url, max_batch_wait_ms=LONG_MS)]) as opened:
        yield opened


async def run(session: Session, *tasks: AITask) -> list[Any]:
    await session.submit_tasks(tasks)
    return [task.return_value for task in await session.wait_tasks(tasks, WITHIN_S)]


# --- what goes out and what comes back


async def test_a_prompt_gives_a_text_and_a_list_gives_a_list_in_order(session: Session) -> None:
    prompts = [f"p{number}" for number in range(5)]
    text, texts, one = await run(session, AITask("hi"), AITask(prompts), AITask(["alone"]))
    assert (text, one) == ("answer to hi", ["answer to alone"])
    assert texts == [f"answer to {prompt}" for prompt in prompts]


async def test_every_parameter_is_sent(session: Session, server: StandIn) -> None:
    task = AITask(
        "hi",
        model="other",
        system_prompt="Be brief.",
        temperature=0.5,
        max_tokens=7,
        top_p=0.9,
        top_k=3,
        seed=11,
        stop_sequences=["x", "y"],
    )
    await run(session, task)
    assert server.bodies == [
        {
            "model": "other",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "max_tokens": 7,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 11,
            "stop": ["x", "y"],
        }
    ]


async def test_what_a_task_leaves_out_is_left_to_the_server(session: Session, server: StandIn) -> None:
    await run(session, AITask("hi"))
    assert server.bodies == [{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}]


async def test_a_top_p_of_zero_is_sent_as_the_least_that_servers_take(session: Session, server: StandIn) -> None:
    await run(session, AITask("hi", top_p=0.0))
    assert 0 < server.bodies[0]["top_p"] < 1e-5


async def test_a_task_that_no_server_takes_is_refused_at_submission(session: Session) -> None:
    with pytest.raises(InvalidTask, match="it has 5 stop_sequences; a model server takes 4 at most"):
        await session.submit_tasks([AITask("hi", stop_sequences=list("abcde"))])


async def test_a_task_has_the_tokens_that_the_server_counted(session: Session, server: StandIn) -> None:
    server.answer = lambda prompt: prompt * 2
    tasks = [AITask("12345"), AITask(["1", "123"])]
    await run(session, *tasks)
    usages = [task.outcome.usage for task in tasks if task.outcome and task.outcome.usage]
    assert [usage.completion_tokens for usage in usages] == [10, 8]
    assert sum(usage.prompt_tokens for usage in usages) == 9


async def test_a_result_too_long_for_a_message_is_a_file(server: StandIn, tmp_path: Path) -> None:
    server.answer = lambda prompt: "é" * 100_000
    async with Session([EndpointInferenceBackend(server.url)], opens_results=False) as session:
        task = AITask("hi")
        await run(session, task)
        assert task.outcome is not None
        value = task.outcome.value
        assert value is not None
        assert Path(value.file or "").parent == session.folder
        assert load_json(value) == "é" * 100_000


async def test_a_task_reports_running_once_when_it_is_sent(session: Session, server: StandIn) -> None:
    server.gate.clear()
    task = AITask("hi")
    await session.submit_tasks([task])
    await server.until(lambda: server.at_work == ["hi"])
    assert task.state is TaskState.RUNNING
    server.gate.set()
    await task


# --- results of other tasks


@pytest.fixture
def value_of_source() -> list[Any]:
    return [None]


@pytest.fixture
async def mixed(server: StandIn, value_of_source: list[Any]) -> AsyncIterator[Session]:
    functions = ScriptedBackend(lambda spec, values: value_of_source[0], kinds=("function", "executable"))
    async with Session([functions, EndpointInferenceBackend(server.url)]) as opened:
        yield opened


@pytest.mark.parametrize(
    ("value", "path", "result"),
    [
        ("text", "", "answer to text"),
        (["a", "b"], "", ["answer to a", "answer to b"]),
        ([], "", []),
        ({"k": ["a", "b"]}, "/k", ["answer to a", "answer to b"]),
        ({"k": ["a", "b"]}, "/k/1", "answer to b"),
        (["a", 1], "", 'answer to ["a",1]'),
        ({"é": 1.5}, "", 'answer to {"é":1.5}'),
        (7, "", "answer to 7"),
        (None, "", "answer to null"),
    ],
)
async def test_a_result_stands_for_its_text_a_list_of_texts_or_its_json(
    mixed: Session, value_of_source: list[Any], value: Any, path: str, result: Any
) -> None:
    value_of_source[0] = value
    source = ComputeTask(print)
    task = AITask(Part(source, path))
    await mixed.submit_tasks([source, task])
    assert (await task).return_value == result


async def test_a_result_in_a_list_of_prompts_is_one_text(mixed: Session, value_of_source: list[Any]) -> None:
    value_of_source[0] = ["a", "b"]
    source = ComputeTask(print)
    task = AITask(["first", source])
    await mixed.submit_tasks([source, task])
    assert (await task).return_value == ["answer to first", 'answer to ["a","b"]']


async def test_a_path_that_leads_nowhere_fails_the_task_as_invalid(mixed: Session, value_of_source: list[Any]) -> None:
    value_of_source[0] = {"a": 1}
    source = ComputeTask(print)
    task = AITask(Part(source, "/b"))
    await mixed.submit_tasks([source, task])
    await mixed.wait_tasks([task])
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.INVALID)
    assert "path '/b' leads nowhere" in str(task.exception)


# --- batches


async def test_prompts_submitted_together_go_out_together_in_bounded_batches(session: Session, server: StandIn) -> None:
    results = await run(session, *(AITask(f"p{number}") for number in range(70)))
    assert results == [f"answer to p{number}" for number in range(70)]
    assert sorted(server.sizes) == [6, 32, 32]


async def test_only_prompts_with_the_same_parameters_and_timeout_share_a_batch(
    session: Session, server: StandIn
) -> None:
    timeout = {"timeout": 60}
    await run(
        session,
        *(AITask("a", temperature=0.1), AITask("b", temperature=0.1, system_prompt="s"), AITask("c", max_tokens=3)),
        *(AITask("d", task_backend_specific_kwargs=timeout), AITask("e", task_backend_specific_kwargs=timeout)),
    )
    batches = [[messages[-1]["content"] for messages in conversations(body)] for body in server.bodies]
    assert sorted(batches) == [["a", "b"], ["c"], ["d", "e"]]


async def fill(session: Session, server: StandIn, requests: int = 8) -> list[AITask]:
    """Give the server so much to do, one request a task, that the next task of the same parameters has to wait."""
    server.gate.clear()
    tasks = [AITask(f"busy {number}") for number in range(requests)]
    for number, task in enumerate(tasks, 1):
        await session.submit_tasks([task])
        await server.until(lambda number=number: len(server.bodies) == number)  # type: ignore[misc]
    return tasks


async def test_prompts_of_other_parameters_do_not_wait_for_each_other(session: Session, server: StandIn) -> None:
    server.gate.clear()
    tasks = [AITask("hi", max_tokens=1 + number) for number in range(40)]
    await session.submit_tasks(tasks)
    await server.until(lambda: len(server.bodies) == 32)
    server.gate.set()
    await session.wait_tasks(tasks)
    assert [len(conversations(body)) for body in server.bodies] == [1] * 40


async def test_what_waits_for_a_busy_server_goes_together_as_soon_as_a_request_ends(
    session: Session, server: StandIn
) -> None:
    busy = await fill(session, server)
    waiting = [AITask(f"p{number}") for number in range(5)]
    for task in waiting:
        await session.submit_tasks([task])
    assert {task.state for task in waiting} == {TaskState.QUEUED}
    await session.cancel(busy[0])
    await server.until(lambda: len(server.bodies) == 9)
    assert server.sizes[-1] == 5
    server.gate.set()
    await session.wait_tasks(waiting)


async def test_no_prompt_waits_longer_than_the_bound_while_the_server_has_room(server: StandIn) -> None:
    async with Session([EndpointInferenceBackend(server.url, max_batch_wait_ms=50)]) as session:
        await fill(session, server)
        await session.submit_tasks([AITask("p1"), AITask("p2")])
        await server.until(lambda: {"p1", "p2"} <= set(server.at_work))
        assert server.sizes[-1] == 2


async def test_max_batch_size_bounds_what_a_server_has_at_a_time(server: StandIn) -> None:
    async with Session([EndpointInferenceBackend(server.url, max_batch_size=3, max_batch_wait_ms=0)]) as session:
        await run(session, *(AITask(f"p{number}") for number in range(10)))
    assert (server.most_at_work, max(server.sizes)) == (3, 3)


async def test_a_bad_prompt_fails_alone_with_the_servers_message(session: Session, server: StandIn) -> None:
    def answer(prompt: str) -> str:
        if prompt == "bad":
            raise Refusal(400, "this prompt is too long")
        return "fine"

    server.answer = answer
    tasks = [AITask(prompt) for prompt in ("a", "bad", "c")]
    await run(session, *tasks)
    assert [task.return_value for task in tasks] == ["fine", None, "fine"]
    assert (tasks[1].state, tasks[1].cause) == (TaskState.FAILED, Cause.INVALID)
    assert "this prompt is too long (HTTP 400" in str(tasks[1].exception)
    assert server.sizes == [3, 1, 1, 1]


async def test_a_list_with_a_bad_prompt_fails_whole_and_says_which(session: Session, server: StandIn) -> None:
    def answer(prompt: str) -> str:
        if prompt == "bad":
            raise Refusal(400, "too long")
        return "fine"

    server.answer = answer
    task = AITask(["a", "b", "bad"])
    await run(session, task)
    assert "prompt 3 of 3: too long" in str(task.exception)


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_server_without_the_batch_address_gets_single_prompts_from_then_on(
    session: Session, server: StandIn, status: int
) -> None:
    server.no_batches = status
    assert await run(session, AITask("a"), AITask("b")) == ["answer to a", "answer to b"]
    assert await run(session, AITask("c"), AITask("d")) == ["answer to c", "answer to d"]
    assert server.sizes == [2, 1, 1, 1, 1]


async def test_an_unknown_model_fails_with_those_that_are_served_and_batches_go_on(
    session: Session, server: StandIn
) -> None:
    unknown = [AITask("a", model="tinny"), AITask("b", model="tinny")]
    await run(session, *unknown)
    assert [task.cause for task in unknown] == [Cause.INVALID, Cause.INVALID]
    assert "unknown model 'tinny' (did you mean 'tiny'?). Valid: other, tiny." in str(unknown[0].exception)
    await run(session, AITask("c"), AITask("d"))
    assert server.sizes[-1] == 2


# --- how tasks end otherwise


@pytest.mark.parametrize(
    ("status", "cause"),
    [(400, Cause.INVALID), (403, Cause.INVALID), (429, Cause.ERROR), (500, Cause.ERROR), (503, Cause.ERROR)],
)
async def test_a_refusal_is_the_tasks_fault_or_the_servers_by_its_status(
    session: Session, server: StandIn, status: int, cause: Cause
) -> None:
    def answer(prompt: str) -> str:
        raise Refusal(status, "no")

    server.answer = answer
    task = AITask("hi")
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, cause)


async def test_a_task_whose_time_is_up_fails_and_its_request_is_ended(session: Session, server: StandIn) -> None:
    server.gate.clear()
    task = AITask("slow", task_backend_specific_kwargs={"timeout": 2})
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.TIMEOUT)
    assert "its time of 2.0 s was up" in str(task.exception)
    await server.until(lambda: server.given_up == [["slow"]])


async def test_a_canceled_task_ends_its_request(session: Session, server: StandIn) -> None:
    server.gate.clear()
    task = AITask("slow")
    await session.submit_tasks([task])
    await server.until(lambda: server.at_work == ["slow"])
    await session.cancel(task)
    assert task.state is TaskState.CANCELED
    await server.until(lambda: server.given_up == [["slow"]])


async def test_when_one_of_a_batch_is_canceled_the_others_are_sent_again_together(
    session: Session, server: StandIn
) -> None:
    server.gate.clear()
    tasks = [AITask(prompt) for prompt in ("a", "b", "c")]
    await session.submit_tasks(tasks)
    await server.until(lambda: len(server.at_work) == 3)
    await session.cancel(tasks[1])
    await server.until(lambda: server.given_up == [["a", "b", "c"]] and sorted(server.at_work) == ["a", "c"])
    server.gate.set()
    await session.wait_tasks(tasks)
    assert [task.state for task in tasks] == [TaskState.DONE, TaskState.CANCELED, TaskState.DONE]
    assert server.sizes == [3, 2]


async def test_a_task_canceled_before_it_is_sent_never_reaches_the_server(session: Session, server: StandIn) -> None:
    await session.submit_tasks([AITask("warm up")])
    busy = await fill(session, server, requests=8)
    waiting, unborn = AITask("waiting"), AITask("unborn")
    await session.submit_tasks([waiting])
    await session.submit_tasks([unborn])
    await session.cancel([waiting, unborn])
    assert {waiting.state, unborn.state} == {TaskState.CANCELED}
    assert waiting.started is None
    server.gate.set()
    await session.wait_tasks(busy)
    sent = [messages[-1]["content"] for body in server.bodies for messages in conversations(body)]
    assert not {"waiting", "unborn"} & set(sent)


async def test_closing_the_session_cancels_what_runs_and_what_waits(server: StandIn) -> None:
    session = Session([EndpointInferenceBackend(server.url, max_batch_wait_ms=LONG_MS)])
    busy = await fill(session, server)
    waiting = AITask("waiting")
    await session.submit_tasks([waiting])
    await session.close()
    assert {task.state for task in [*busy, waiting]} == {TaskState.CANCELED}
    await server.until(lambda: len(server.given_up) == 8)


async def test_a_broken_connection_is_a_lost_task() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        broken = ChatServer(f"http://127.0.0.1:{port}/v1")
        outcome = (await answered(PromptRunner([broken], Defaults("tiny"), Limits()), "hi"))["hi"]
        await broken.close()
    assert (outcome.state, outcome.cause) == (TaskState.FAILED, Cause.LOST)
    assert f"no answer from http://127.0.0.1:{port}/v1" in outcome.error


# --- several servers


@pytest.fixture
async def second() -> AsyncIterator[StandIn]:
    async with serve(StandIn()) as stand_in:
        yield stand_in


@pytest.fixture
async def chat_servers(server: StandIn, second: StandIn) -> AsyncIterator[list[ChatServer]]:
    opened = [await ChatServer(stand_in.url).ask_models() for stand_in in (server, second)]
    yield opened
    for one in opened:
        await one.close()


def order(prompt: str) -> TaskRun:
    spec = TaskSpec(uid=prompt, work=Completion(prompts=(prompt,), many=False), layout=Layout("native"))
    return TaskRun(spec=spec, bindings={}, results_folder="")


def read_nothing(value: Value) -> Any:
    raise NotImplementedError


async def answered(
    completions: PromptRunner, *prompts: str, then: Callable[[], Any] = lambda: None
) -> dict[str, Outcome]:
    """The outcomes of these prompts, by prompt; `then` is called after they are submitted."""
    outcomes: dict[str, Outcome] = {}
    all_ended = asyncio.Event()

    def report(event: Event) -> None:
        if isinstance(event, Ended):
            assert event.uid not in outcomes
            outcomes[event.uid] = event.outcome
            if len(outcomes) == len(prompts):
                all_ended.set()
        else:
            assert isinstance(event, Running)

    completions.submit([order(prompt) for prompt in prompts], report, read_nothing)
    await then() if asyncio.iscoroutinefunction(then) else then()
    async with asyncio.timeout(WITHIN_S):
        await all_ended.wait()
    return outcomes


async def test_the_less_busy_server_gets_the_next_batch(
    server: StandIn, second: StandIn, chat_servers: list[ChatServer]
) -> None:
    completions = PromptRunner(chat_servers, Defaults("tiny"), Limits(batch=2))
    outcomes = await answered(completions, "a", "b", "c", "d", "e")
    assert {outcome.state for outcome in outcomes.values()} == {TaskState.DONE}
    assert sorted(server.sizes + second.sizes) == [1, 2, 2]
    assert server.sizes
    assert second.sizes


async def test_what_a_lost_server_worked_on_is_lost_and_what_waits_goes_to_the_other(
    server: StandIn, second: StandIn, chat_servers: list[ChatServer]
) -> None:
    server.gate.clear()
    second.gate.clear()
    completions = PromptRunner(chat_servers, Defaults("tiny"), Limits(batch=1, at_once=1))

    async def lose() -> None:
        await server.until(lambda: len(server.at_work) == 1)
        await second.until(lambda: len(second.at_work) == 1)
        completions.remove_server(chat_servers[0], "the server died")
        second.gate.set()

    outcomes = await answered(completions, "a", "b", "c", then=lose)
    assert sorted(outcome.state for outcome in outcomes.values()) == ["DONE", "DONE", "FAILED"]
    assert [(outcome.cause, outcome.error) for outcome in outcomes.values() if outcome.cause] == [
        (Cause.LOST, "the server died")
    ]
    await completions.close()


async def test_without_any_server_left_every_prompt_that_was_not_sent_is_returned_in_words(
    chat_servers: list[ChatServer],
) -> None:
    completions = PromptRunner(chat_servers, Defaults("tiny"), Limits())
    for chat_server in chat_servers:
        completions.remove_server(chat_server, "the server died")
    events: asyncio.Queue[Event] = asyncio.Queue()
    completions.submit([order("a"), order("b")], events.put_nowait, read_nothing)
    assert [await events.get(), await events.get()] == [
        Returned("a", "the server died"),
        Returned("b", "the server died"),
    ]
    await completions.close()


async def test_a_server_in_place_of_one_that_was_lost_gets_prompts(chat_servers: list[ChatServer]) -> None:
    completions = PromptRunner(chat_servers[:1], Defaults("tiny"), Limits())
    completions.remove_server(chat_servers[0], "the server died")
    completions.add_server(chat_servers[1])
    outcomes = await answered(completions, "a", "b")
    assert {outcome.state for outcome in outcomes.values()} == {TaskState.DONE}
    await completions.close()


# --- the endpoint backend


async def test_an_endpoint_takes_the_first_model_and_is_found_without_v1(server: StandIn) -> None:
    backend = await EndpointInferenceBackend(server.url.removesuffix("/v1"), api_key="k-secret")
    assert backend.describe() == {
        "backend": "endpoint",
        "progress": "ready",
        "url": server.url,
        "model": "tiny",
        "models": ["tiny", "other"],
    }
    assert server.keys == {"Bearer k-secret"}
    await backend.close()
    await backend.close()


async def test_an_endpoint_that_does_not_answer_is_unavailable() -> None:
    listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    with pytest.raises(BackendUnavailable, match=f"no answer from http://127.0.0.1:{port}/v1"):
        await EndpointInferenceBackend(f"http://127.0.0.1:{port}/v1")


async def test_an_address_that_is_no_model_server_is_refused(server: StandIn) -> None:
    with pytest.raises(InvalidSettings, match="is no OpenAI-compatible server"):
        await EndpointInferenceBackend(server.url + "/models/nowhere")
    for url in ("localhost:8000", "http://", "somewhere"):
        with pytest.raises(InvalidSettings, match='valid is one such as "http://127'):
            await EndpointInferenceBackend(url)


async def test_an_endpoint_without_models_asks_for_a_name(server: StandIn) -> None:
    server.models = []
    with pytest.raises(InvalidSettings, match="lists no models; name one"):
        await EndpointInferenceBackend(server.url)


async def test_a_closed_endpoint_does_not_start(server: StandIn) -> None:
    backend = EndpointInferenceBackend(server.url)
    await backend.close()
    with pytest.raises(BackendUnavailable, match="is closed; make a new one"):
        await backend


@pytest.mark.parametrize("bounds", [{"max_batch_size": 0}, {"max_batch_wait_ms": -1}])
async def test_bounds_below_the_least_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match=f"{next(iter(bounds))} is .*; valid is a"):
        EndpointInferenceBackend("http://127.0.0.1/v1", **bounds)


async def test_a_cancelled_start_leaves_nothing_and_may_be_tried_again(server: StandIn) -> None:
    backend = EndpointInferenceBackend(server.url)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await backend
    await backend
    assert backend.progress == "ready"
    await backend.close()
