"""A language model in the pipeline, on real vLLM and real Dragon; the journeys share one start of each."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from rhapsody_mcp.demo import training
from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.vllm,
    IN_ONE_ERA,
]

SAMPLE = (
    "Write one labelled sample as JSON: features f1 to f4, each between -3 and 3 with one decimal, and a label, which "
    "is 1 if their sum is positive, else 0. This is sample number {item}."
)
SAMPLES = {"prompt": SAMPLE, "temperature": 1.0, "max_tokens": 200, "json_schema": training.SCHEMA}
PIPELINE: list[dict[str, Any]] = [
    {"name": "samples", **SAMPLES, "for_each": list(range(1, 201))},
    {"name": "train", "source": inspect.getsource(training), "entry": "train", "args": [{"ref": "samples"}]},
]


@pytest.fixture(scope="module")
async def pipeline(server: Traveller) -> AsyncIterator[tuple[Traveller, dict[str, Any]]]:
    """One who has run the pipeline, its engines started on the way, and what it last read of it."""
    agent = Traveller(server.client, server.person, server.line)
    with anyio.fail_after(600):
        await agent.create()
        await agent.submit(*PIPELINE)
        while not (waited := await agent.wait(timeout_s=55))["ended"]:
            pass
    yield agent, waited
    await agent.call("close_session", session=agent.session, force=True)


async def test_inference_then_training_takes_at_most_four_calls_with_the_start_of_the_engines(
    pipeline: tuple[Traveller, dict[str, Any]],
) -> None:
    agent, waited = pipeline
    assert waited["counts"] == {"DONE": 201} and set(waited["engines"]) == {"dragon", "vllm"}
    trained = rows_by_name(waited)["train"]["result"]
    assert trained["samples"] == 200 and trained["accuracy"] >= 0.85
    assert trained["accuracy"] > trained["accuracy_of_the_commoner_label"]
    waits = agent.calls - 2
    assert waits <= 2 and agent.tokens < 1_000 + 1_000 * waits


async def test_one_who_comes_back_waits_for_a_slow_model_in_two_bounded_calls(
    pipeline: tuple[Traveller, dict[str, Any]],
) -> None:
    before, _ = pipeline
    agent = Traveller(before.client, before.person, before.line)
    with anyio.fail_after(600):
        (found,) = (await agent.call("list_sessions"))["sessions"]
        agent.session = found["session"]
        await agent.submit({"name": "more", **SAMPLES, "for_each": list(range(400))})
        first = await agent.wait(tasks=["more"], timeout_s=0.1)
        second = await agent.wait(tasks=["more"], cursor=first["cursor"])
    assert not first["ended"] and first["waited_s"] < 5 and "vllm" in first["engines"]
    assert first["open"] and "more" in first["open"][0]
    assert second["counts"] == {"DONE": 400} and agent.calls == 4 and agent.tokens < 2_500
