"""The vLLM backend with a real vLLM server and the model that comes with the package."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rhapsody_mcp.api import AITask, Session, Text
from rhapsody_mcp.backends import DragonVllmInferenceBackend
from rhapsody_mcp.bench.measurement import measure
from rhapsody_mcp.bench.prompts import rows_on
from rhapsody_mcp.engine.process.tree import descendants
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings, InvalidTask
from rhapsody_mcp.model.states import Cause, TaskState

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

CONFIG = """
server:
  model: shipped
  device: cpu
  extra_args: [--enable-log-requests]
llm:
  repetition_penalty: 1.01
  system_prompt: Always answer.
  vllm_log_level: debug
"""


@pytest.fixture(scope="module")
async def backend(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DragonVllmInferenceBackend]:
    file = tmp_path_factory.mktemp("vllm") / "config.yaml"
    file.write_text(CONFIG)
    started = await DragonVllmInferenceBackend(str(file), "Pretty-Name", num_nodes=1, num_gpus=1, tp_size=1)
    yield started
    await started.close()


@pytest.fixture(scope="module")
async def session(backend: DragonVllmInferenceBackend) -> AsyncIterator[Session]:
    async with Session([backend]) as opened:
        yield opened


async def run(session: Session, *tasks: AITask) -> None:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)


def log_of(backend: DragonVllmInferenceBackend) -> str:
    return Path(backend.describe()["logs"][0]).read_text()


async def http(
    backend: DragonVllmInferenceBackend, method: str, path: str, body: object = None, key: str = ""
) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
        url = backend.urls[0].removesuffix("/v1") + path
        return await client.request(method, url, json=body, headers=headers)


async def metric(backend: DragonVllmInferenceBackend, name: str, label: str = "") -> float:
    text = (await http(backend, "GET", "/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{") and label in line]
    return sum(float(line.split()[-1]) for line in lines)


# --- what it is


async def test_it_says_what_it_serves_and_never_its_key(backend: DragonVllmInferenceBackend) -> None:
    described = backend.describe()
    assert described["progress"] == "ready"
    assert (described["model"], described["device"], described["replicas"]) == ("Pretty-Name", "cpu", 1)
    assert described["urls"] == backend.urls
    assert backend.api_key not in str(described)


async def test_its_openai_api_wants_the_key_at_every_address_that_runs_the_model(
    backend: DragonVllmInferenceBackend,
) -> None:
    body = {"model": "rhapsody-tiny", "messages": [{"role": "user", "content": "hi"}]}
    with_key = await http(backend, "POST", "/v1/chat/completions", body, key=backend.api_key)
    assert with_key.json()["choices"][0]["message"]["content"].startswith("{")
    for path in ("/v1/chat/completions", "/invocations", "/tokenize"):
        assert (await http(backend, "POST", path, body)).status_code == 401
        assert (await http(backend, "POST", path, body, key="wrong")).status_code == 401


async def test_its_key_is_on_no_command_line(backend: DragonVllmInferenceBackend) -> None:
    commands = [command_of(pid) for pid in descendants(os.getpid())]
    assert any("vllm_launcher" in command for command in commands)
    assert not any(backend.api_key in command for command in commands)


# --- what tasks get


async def test_a_prompt_gives_a_text_and_a_list_gives_a_list(session: Session) -> None:
    one, several = AITask("Write a sample.", max_tokens=80), AITask(["One.", "Two.", "Three."], max_tokens=80)
    await run(session, one, several)
    assert one.return_value.startswith('{"f1": ')
    assert [text[:7] for text in several.return_value] == ['{"f1": '] * 3


async def test_every_parameter_reaches_the_engine(session: Session, backend: DragonVllmInferenceBackend) -> None:
    task = AITask(
        "Write a sample for parameters.",
        model="rhapsody-tiny",
        system_prompt="You know JSON.",
        temperature=0.25,
        max_tokens=33,
        top_p=0.75,
        top_k=17,
        stop_sequences=["f3", "f4"],
    )
    await run(session, task)
    view = request_about(backend, "Write a sample for parameters.")
    expected = ["temperature=0.25", "max_tokens=33", "top_p=0.75", "top_k=17", "stop=['f3', 'f4']"]
    assert [parameter for parameter in expected if parameter not in view] == []
    assert "You know JSON." in view
    assert "Always answer." not in view
    assert task.return_value.endswith(', "')


async def test_the_files_defaults_reach_the_engine(session: Session, backend: DragonVllmInferenceBackend) -> None:
    await run(session, AITask("Write a sample for defaults."))
    view = request_about(backend, "Write a sample for defaults.")
    assert "repetition_penalty=1.01" in view
    assert "Always answer." in view


async def test_a_conversation_has_the_default_system_prompt_unless_it_brings_its_own(
    session: Session, backend: DragonVllmInferenceBackend
) -> None:
    sample = AITask("Sample of a chat.", max_tokens=8)
    asked = [{"role": "user", "content": Text("Chat one, ", sample)}]
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Chat two."}]
    answers = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    await run(session, sample, *(AITask(messages=messages, max_tokens=8) for messages in (asked, own, answers)))
    assert "Always answer." in (view := request_about(backend, "Chat one, ")) and sample.return_value[:5] in view
    assert "Mine." in (view := request_about(backend, "Chat two.")) and "Always answer." not in view


async def test_several_answers_are_drawn_one_by_one_and_a_seed_repeats_them(session: Session) -> None:
    drawn = [AITask("Several.", n=3, temperature=1.5, seed=seed, max_tokens=30) for seed in (1, 1, 2)]
    await run(session, *drawn)
    first, again, other = (task.return_value for task in drawn)
    assert len(set(first)) > 1 and first == again != other


async def test_tokens_come_with_their_log_probabilities(session: Session) -> None:
    plain, likely = AITask("Tokens.", logprobs=0, max_tokens=5), AITask(["Tokens."], logprobs=3, n=2, max_tokens=5)
    await run(session, plain, likely)
    (several,) = likely.return_value
    for answer, most in ((plain.return_value, 0), *((one, 3) for one in several)):
        assert "".join(token["token"] for token in answer["logprobs"]) == answer["text"] != ""
        assert all(token["logprob"] <= 0 for token in answer["logprobs"])
        assert {len(token["top_logprobs"]) for token in answer["logprobs"]} == {most}


def request_about(backend: DragonVllmInferenceBackend, prompt: str) -> str:
    """What the server logged about the last request with this prompt: its text and its parameters."""
    log = log_of(backend)
    identity = re.findall(rf"Request (\S+) details: prompt: .*{re.escape(prompt)}", log)[-1]
    return "\n".join(line for line in log.splitlines() if identity in line)


async def test_prompts_go_out_in_batches_in_the_order_of_their_list(
    session: Session, backend: DragonVllmInferenceBackend
) -> None:
    await run(session, AITask([f"Sample number {number}." for number in range(40)], max_tokens=4))
    found = re.findall(r"Request \S+?_(\d+) details: prompt: .*Sample number (\d+)\.", log_of(backend))
    places = {int(number): int(index) for index, number in found}
    assert places == {number: number % 32 for number in range(40)}


async def test_extremes_that_the_api_allows_are_answered(session: Session) -> None:
    greedy = [AITask("Same.", temperature=0.0, max_tokens=40), AITask("Same.", top_p=0.0, max_tokens=40)]
    others = [AITask("Hot.", temperature=2.0, top_k=-1), AITask("Cold.", top_k=1, top_p=1.0, max_tokens=1)]
    await run(session, *greedy, *others)
    assert {task.state for task in greedy + others} == {TaskState.DONE}
    assert greedy[0].return_value == greedy[1].return_value


async def test_more_prompts_with_seeds_at_once_than_one_step_of_the_model_takes_are_answered(session: Session) -> None:
    """vLLM 0.32 on the CPU ends where it cuts such a prompt: its generators of random numbers cannot be set back."""
    prompts = [AITask(f"Write sample {number}.", temperature=1.0, max_tokens=8, seed=number) for number in range(200)]
    await run(session, *prompts)
    assert [task.exception for task in prompts if task.exception] == []


async def test_a_seed_makes_an_answer_repeatable(session: Session) -> None:
    seeded = [AITask("Write a sample.", temperature=2.0, max_tokens=40, seed=seed) for seed in (7, 7, 8)]
    await run(session, *seeded)
    first, again, other = [task.return_value for task in seeded]
    assert first == again != other


async def test_a_thousand_prompts_are_answered(session: Session) -> None:
    tasks = [AITask(f"Sample {number}.", max_tokens=8) for number in range(1000)]
    await run(session, *tasks)
    assert {task.state for task in tasks} == {TaskState.DONE}


async def test_tokens_and_cut_answers_are_told(session: Session) -> None:
    task = AITask(["One.", "Two."], max_tokens=5)
    await run(session, task)
    assert task.outcome is not None and task.outcome.usage is not None
    assert task.outcome.usage.completion_tokens == 10
    assert task.notes[:1] == ("2 of 2 answers were cut off at max_tokens or the model's length",)


SAMPLE = {
    "type": "object",
    "properties": {
        **{f"f{axis}": {"type": "number", "minimum": -3, "maximum": 3} for axis in range(1, 5)},
        "label": {"enum": [0, 1]},
    },
    "required": ["f1", "f2", "f3", "f4", "label"],
}
CARD = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 8},
        "pages": {"type": "integer", "minimum": 1, "maximum": 99},
        "read": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["title", "pages", "read", "tags"],
}


def is_card(value: Any) -> bool:
    """What CARD says, in Python: the server held the model to it."""
    return (
        list(value) == ["title", "pages", "read", "tags"]
        and isinstance(value["title"], str)
        and value["pages"] in range(1, 100)
        and value["read"] in (True, False)
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"new", "old", None}
    )


async def test_an_answer_is_the_object_that_its_schema_describes(session: Session) -> None:
    one, several = AITask("A card.", json_schema=CARD), AITask([f"Card {n}." for n in range(40)], json_schema=CARD)
    await run(session, one, several)
    assert is_card(one.return_value), one.exception
    assert len(several.return_value) == 40 and all(map(is_card, several.return_value))


async def test_two_schemas_in_one_submission_both_hold_and_prompts_without_one_stay_text(session: Session) -> None:
    cards = [AITask(f"Card {number}.", json_schema=CARD) for number in range(8)]
    samples = [AITask(f"Sample {number}.", json_schema=SAMPLE) for number in range(8)]
    free = AITask("Write a sample.")
    await run(session, *cards, *samples, free)
    assert all(is_card(task.return_value) for task in cards)
    assert all(list(task.return_value) == SAMPLE["required"] for task in samples)
    assert isinstance(free.return_value, str)


async def test_the_shipped_model_labels_as_well_with_the_schema_as_without(session: Session) -> None:
    task = AITask([f"Sample {number}." for number in range(200)], json_schema=SAMPLE, temperature=1.0, max_tokens=200)
    await run(session, task)
    right = [sample["label"] == int(round(sum_of(sample), 3) > 0) for sample in task.return_value]
    assert sum(right) >= 0.9 * 200
    assert 0.3 < sum(sample["label"] for sample in task.return_value) / 200 < 0.7


def sum_of(sample: dict[str, float]) -> float:
    return sum(sample[f"f{axis}"] for axis in range(1, 5))


async def test_no_blanks_fill_the_tokens_of_an_object(session: Session, backend: DragonVllmInferenceBackend) -> None:
    body = {
        **{"model": "rhapsody-tiny", "messages": [{"role": "user", "content": "A card."}], "max_tokens": 200},
        "response_format": {"type": "json_schema", "json_schema": {"name": "card", "schema": CARD}},
    }
    reply = await http(backend, "POST", "/v1/chat/completions", body, key=backend.api_key)
    written = reply.json()["choices"][0]["message"]["content"]
    assert written == json.dumps(json.loads(written), separators=(",", ":"))


async def test_an_object_that_is_cut_fails_its_task_and_one_that_fits_does_not(session: Session) -> None:
    short, enough = AITask(["a", "b"], json_schema=SAMPLE, max_tokens=20), AITask("c", json_schema=SAMPLE)
    await run(session, short, enough)
    assert (short.state, short.cause) == (TaskState.FAILED, Cause.ERROR)
    assert "the answer to prompt 1 of 2 was cut at max_tokens (20)" in str(short.exception)
    assert short.outcome is not None and short.outcome.usage is not None
    assert short.outcome.usage.completion_tokens == 40
    assert enough.state is TaskState.DONE


async def test_every_other_parameter_holds_beside_a_schema(
    session: Session, backend: DragonVllmInferenceBackend
) -> None:
    parameters: dict[str, Any] = {"temperature": 0.25, "max_tokens": 133, "top_p": 0.75, "top_k": 17}
    await run(session, AITask("Sample for all.", json_schema=SAMPLE, system_prompt="You know.", **parameters))
    view = request_about(backend, "Sample for all.")
    assert [name for name, value in parameters.items() if f"{name}={value}" not in view] == []
    assert "You know." in view


async def test_a_schema_that_the_engine_cannot_hold_fails_alone_with_its_message(session: Session) -> None:
    impossible = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tasks = [AITask("a", json_schema=impossible), AITask("b", json_schema=impossible), AITask("c", json_schema=SAMPLE)]
    await run(session, *tasks)
    assert [task.cause for task in tasks] == [Cause.INVALID, Cause.INVALID, None]
    assert 'Unimplemented keys: ["uniqueItems"] (HTTP 400' in str(tasks[0].exception)


async def test_a_prompt_that_is_too_long_fails_alone_with_the_servers_message(session: Session) -> None:
    tasks = [AITask("Short."), AITask("x" * 5000), AITask("Short too.")]
    await run(session, *tasks)
    assert [task.state for task in tasks] == [TaskState.DONE, TaskState.FAILED, TaskState.DONE]
    assert tasks[1].cause is Cause.INVALID
    assert "maximum context length is 4096 tokens" in str(tasks[1].exception)


async def test_an_unknown_model_is_refused_with_those_that_are_served(session: Session) -> None:
    with pytest.raises(InvalidTask, match=r"did you mean 'Pretty-Name'\?\)\. Valid: Pretty-Name, rhapsody-tiny"):
        await session.submit_tasks([AITask("Hello.", model="Pretty-Nam")])


async def test_canceling_ends_the_work_in_the_engine(session: Session, backend: DragonVllmInferenceBackend) -> None:
    ended_before = await metric(backend, "request_success_total")
    task = AITask([f"Sample {number}." for number in range(3000)])
    await session.submit_tasks([task])
    await until(partial(is_working, backend))
    await session.cancel(task)
    assert task.state is TaskState.CANCELED
    await until(partial(is_idle, backend))
    assert await metric(backend, "request_success_total") - ended_before < 3000


async def is_working(backend: DragonVllmInferenceBackend) -> bool:
    return await metric(backend, "num_requests_running") > 0


async def is_idle(backend: DragonVllmInferenceBackend) -> bool:
    return await metric(backend, "num_requests_running") + await metric(backend, "num_requests_waiting") == 0


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that another process does; it sends no event."""
    async with asyncio.timeout(600):
        while not await holds():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.02)


# --- what cannot be


async def test_a_taken_port_is_refused_and_the_next_one_too(backend: DragonVllmInferenceBackend) -> None:
    port = int(backend.urls[0].rpartition(":")[2].removesuffix("/v1"))
    with pytest.raises(BackendUnavailable, match=f"port {port} is taken, by a server of yours .* or None for any"):
        await DragonVllmInferenceBackend(model="shipped", port=port)
    with pytest.raises(BackendUnavailable, match=f"port {port} is taken"):
        await DragonVllmInferenceBackend(model="shipped", device="cpu", num_gpus=2, port=port - 1)


async def test_tasks_of_a_model_folder_without_weights_fail_and_the_session_goes_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    async with Session([DragonVllmInferenceBackend(model=str(tmp_path))]) as session:
        for _ in range(2):
            task = AITask("Hello.")
            await run(session, task)
            assert (task.state, task.cause) == (TaskState.FAILED, Cause.INVALID)
            assert "has no weights" in str(task.exception)


async def test_a_missing_gpu_is_refused_with_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidSettings, match=r"num_gpus is 1, and nvidia-smi lists no GPU .*give device cpu"):
        await DragonVllmInferenceBackend(model="shipped", num_gpus=1)


async def test_a_server_that_ends_at_once_and_would_again_is_refused_with_its_words_and_its_log(tmp_path: Path) -> None:
    before = set(descendants(os.getpid()))
    (tmp_path / "config.yaml").write_text("server: {model: shipped, extra_args: [--no-such-flag]}")
    backend = DragonVllmInferenceBackend(tmp_path / "config.yaml")
    with pytest.raises(InvalidSettings, match=r"exit code 2.*no-such-flag.*Correct extra_args in") as raised:
        await backend
    log, _, end = str(raised.value).rpartition("Its log, ")[2].partition(", ends: ")
    assert end.rpartition(" | ")[2][:100] in text_of(log)
    assert set(descendants(os.getpid())) == before
    await backend.close()
    assert not is_there(log)


@pytest.mark.ci
async def test_a_model_that_the_hub_does_not_give_makes_its_tasks_invalid_with_what_to_give() -> None:
    async with Session([DragonVllmInferenceBackend(model="nosuch/model", device="cpu")]) as session:
        task = AITask("Hello.")
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=600)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.INVALID)
    assert "Give another model (create_session's model; model in the config file's section server)" in str(
        task.exception
    )


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    before = set(descendants(os.getpid()))
    backend = DragonVllmInferenceBackend(model="shipped")
    starting = asyncio.create_task(backend.start())

    async def is_up() -> bool:
        return any("vllm_launcher" in command_of(pid) for pid in set(descendants(os.getpid())) - before)

    await until(is_up)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert set(descendants(os.getpid())) == before
    await backend.close()


def text_of(path: str) -> str:
    return Path(path).read_text()


def is_there(path: str) -> bool:
    return os.path.exists(path)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


# --- two servers, and how they end


@pytest.mark.ci
async def test_two_servers_share_the_prompts_and_a_death_is_told_and_when_none_is_left_they_start_anew(
    tmp_path: Path,
) -> None:
    before = set(descendants(os.getpid()))
    shared_before = shared_memory()
    first = free_pair()
    backend = await DragonVllmInferenceBackend(model="shipped", device="cpu", num_gpus=2, tp_size=1, port=first)
    assert backend.urls == [f"http://127.0.0.1:{first}/v1", f"http://127.0.0.1:{first + 1}/v1"]
    pids = set(descendants(os.getpid())) - before
    made = shared_memory() - shared_before
    assert made
    async with Session([backend]) as session:
        tasks = [AITask(f"Sample {number}.", max_tokens=8) for number in range(200)]
        await run(session, *tasks)
        assert {task.state for task in tasks} == {TaskState.DONE}
        assert "Received request" not in log_of(backend)

        long = AITask([f"Sample {number}." for number in range(2000)])
        await session.submit_tasks([long])
        await until(partial(is_working, backend))
        os.kill(server_pid(pids, first), signal.SIGKILL)
        await session.wait_tasks([long], timeout=600)
        assert (long.state, long.cause) == (TaskState.FAILED, Cause.LOST)
        assert f"the vLLM server on port {first} ended: " in str(long.exception)

        survivor = AITask("Still there?")
        await run(session, survivor)
        assert survivor.state is TaskState.DONE

        os.kill(server_pid(pids, first + 1), signal.SIGKILL)
        late = AITask("Nobody there?", max_tokens=8, retries=1)
        await session.submit_tasks([late])
        await session.wait_tasks([late], timeout=600)
        assert late.state is TaskState.DONE, late.exception
        pids |= set(descendants(os.getpid())) - before
    assert {pid for pid in pids if command_of(pid)} == set()
    assert shared_memory() & made == set()


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-"))}


def server_pid(pids: set[int], port: int) -> int:
    """The server process itself: its keeper has the same command line after its own."""
    servers = [pid for pid in pids if f"--port {port} " in command_of(pid) and "keeper" not in command_of(pid)]
    return min(servers)


def free_pair() -> int:
    """A port that is free and whose successor is, too."""
    for _ in range(100):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two free ports in a row")


async def test_the_prompts_of_the_benchmark_are_answered_by_both_sides(
    session: Session, backend: DragonVllmInferenceBackend
) -> None:
    async with rows_on(session, backend, 40, 4) as rows:
        figures = [await measure(row, 1) for row in rows]
    assert len(figures) == 3 and all(figure.times for figure in figures)
