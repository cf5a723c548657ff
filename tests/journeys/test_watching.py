"""Running tasks are watched: what they print, how far they are, and the moment at which to stop them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.types import TextResourceContents

from tests.journeys.travellers import IN_ONE_ERA, Traveller

pytestmark = [pytest.mark.anyio, IN_ONE_ERA]

TRAIN = """
def train(stop):
    import os, sys, time
    from rhapsody_mcp.task import progress

    loss = 1.0
    for epoch in range(1, 1000):
        loss *= 0.9
        print("epoch", epoch)
        print("a warning", file=sys.stderr)
        progress(epoch, 1000, f"epoch {epoch}", loss=loss)
        if os.path.exists(stop):
            break
        time.sleep(0.05)
    return loss
"""
PROGRAM = """
import json, os, sys, time
for step in range(1, 1000):
    print(f"step {step}" + chr(10), end="")  # whole lines: unbuffered, print writes its parts one after the other
    with open(os.environ["RHAPSODY_PROGRESS"], "a") as told:
        told.write(json.dumps({"step": step, "of": 1000, "loss": 1 / step}) + chr(10))
    if os.path.exists(sys.argv[1]):
        break
    time.sleep(0.05)
"""


@pytest.fixture(params=["local", "dragon"])
async def opened(agent: Traveller, request: pytest.FixtureRequest) -> AsyncIterator[Traveller]:
    await agent.create(request.param)
    yield agent


@pytest.fixture
def stop(tmp_path: Path) -> Path:
    return tmp_path / "stop"


def function(stop: Path) -> dict[str, Any]:
    return {"name": "train", "source": TRAIN, "args": [str(stop)]}


def function_of_its_own(stop: Path) -> dict[str, Any]:
    return {**function(stop), "process": True}


def program(stop: Path) -> dict[str, Any]:
    return {"name": "train", "executable": sys.executable, "arguments": ["-c", PROGRAM, str(stop)]}


@pytest.mark.parametrize("task", [function, function_of_its_own, program])
async def test_an_agent_stops_a_training_when_the_loss_is_low_in_two_calls(
    opened: Traveller, task: Any, stop: Path
) -> None:
    await opened.submit(task(stop))
    calls = opened.calls
    waited = await opened.wait(until={"task": "train", "field": "loss", "below": 0.3})
    assert waited["until"]["met"] and waited["counts"] == {"RUNNING": 1}
    assert opened.texts[-1].startswith("Condition met: train RUNNING has loss below 0.3: ")
    assert waited["running"]["train"]["numbers"]["loss"] < 0.3 and waited["running"]["train"]["of"] == 1000
    canceled = await opened.call("cancel_tasks", session=opened.session, tasks=["train"])
    assert canceled["canceled"] == 1 and opened.calls - calls == 2
    row = (await opened.call("list_tasks", session=opened.session))["tasks"][0]
    assert row["progress"]["numbers"]["loss"] < 0.3
    history = row["progress"]["history"]["loss"]
    assert history == sorted(history, reverse=True) and 2 <= len(history) <= 32


@pytest.mark.parametrize("task", [function, function_of_its_own, program])
async def test_what_a_running_task_printed_is_read_from_both_ends_and_searched(
    opened: Traveller, task: Any, stop: Path
) -> None:
    await opened.submit(task(stop))
    word = "step" if task is program else "epoch"
    waited = await opened.wait(until={"task": "train", "text": f"{word} 12"})
    assert waited["until"] == {"met": True, "text": f"train RUNNING printed: {word} 12"}
    first = await opened.result("train", output="head")
    assert first["state"] == "RUNNING" and first["stdout"].startswith(f"{word} 1\n{word} 2\n")
    assert f"{word} 12\n" in (await opened.result("train", output="tail"))["stdout"]
    found = await opened.result("train", search=f"{word} 11|{word} 12")
    assert found["stdout"].splitlines()[:2] == [f"11: {word} 11", f"12: {word} 12"]
    await anyio.Path(stop).touch()
    assert (await opened.wait())["counts"] == {"DONE": 1}
    whole = await opened.result("train", output="head")
    assert whole["stdout"].startswith(f"{word} 1\n{word} 2\n") and whole["progress"]["step"] >= 12


async def test_a_search_in_a_sweep_finds_what_ended_and_running_items_printed(opened: Traveller, stop: Path) -> None:
    script = f"echo found $0; [ $0 = 0 ] || until [ -e {stop} ]; do sleep 0.05; done"
    each = {"name": "each", "executable": "sh", "arguments": ["-c", script, {"item": True}], "for_each": [0, 1]}
    await opened.submit(each)
    await opened.wait(count=1)
    await opened.wait(until={"task": "each[1]", "text": "found 1"})
    found = await opened.result("each", search="found")
    assert found["state"] == "RUNNING"
    assert found["stdout"].splitlines() == ["each[0] 1: found 0", "each[1] 1: found 1"]
    await anyio.Path(stop).touch()
    await opened.wait()


async def test_lines_of_ranks_and_items_are_told_apart(opened: Traveller, stop: Path) -> None:
    job = {**program(stop), "name": "job", "ranks": 2}
    each = {**program(stop), "name": "each", "for_each": 2}
    for task, labels in ((job, ("[0] ", "[1] ")), (each, ("each[0] ", "each[1] "))):
        await opened.submit(task)
        with anyio.fail_after(60):
            while True:
                shown = await opened.result(task["name"], output="tail")
                lines = shown.get("stdout", "").splitlines()
                if all(any(line.startswith(label) for line in lines) for label in labels):
                    break
        assert all(line.startswith(labels) for line in lines)
        log = f"rhapsody://sessions/{opened.session}/tasks/{task['name']}/stdout"
        assert f"{labels[1]}step 1" in await read(opened, log)
        await anyio.Path(stop).touch()
        await opened.wait(tasks=[task["name"]])
        assert f"{labels[1]}step 1" in await read(opened, log)
        await anyio.Path(stop).unlink()


async def read(agent: Traveller, uri: str) -> str:
    [content] = (await agent.client.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    return content.text


async def test_a_condition_that_cannot_be_met_any_more_says_so_at_once(agent: Traveller, stop: Path) -> None:
    await agent.create("local")
    await anyio.Path(stop).touch()
    await agent.submit(function(stop), {"name": "silent", "executable": "/bin/true"})
    waited = await agent.wait(until={"task": "train", "field": "loss", "below": 0.1})
    assert not waited["until"]["met"]
    text = waited["until"]["text"]
    assert text == "train ended DONE without loss below 0.1; the last was 1 of 1000, epoch 1, loss 0.9"
    told = (await agent.wait(until={"task": "train", "field": "accuracy", "above": 1}))["until"]["text"]
    assert told == "train ended DONE without accuracy above 1: it told loss"
    told = (await agent.wait(until={"task": "silent", "field": "loss", "below": 1}))["until"]["text"]
    assert "it told nothing" in told and "$RHAPSODY_PROGRESS" in told
    refusal = await agent.refusal("wait_tasks", session=agent.session, until={"task": "train", "below": 1})
    assert '{"task": "train", "field": "loss", "below": 0.6}' in refusal
