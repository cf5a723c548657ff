"""The main job, with a real client, the real server, real Dragon and real vLLM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid

import anyio
import pytest

from tests.bare_client import busy_server
from tests.processes import FAMILY, family, wait_until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.vllm,
]
DEMO = [sys.executable, "-m", "rhapsody_mcp", "demo", "--samples", "200"]


async def test_the_demo_trains_on_what_the_model_wrote_in_at_most_four_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAMILY, uuid.uuid4().hex)
    with anyio.fail_after(600):
        ran = await anyio.run_process(DEMO, check=False, stderr=subprocess.STDOUT)
    said = ran.stdout.decode()
    assert ran.returncode == 0, said
    number = {name: float(value) for name, value in re.findall(r"^  ([a-z ]+): ([\d.]+)$", said, re.MULTILINE)}
    assert number["samples"] == 200
    assert number["accuracy"] >= 0.85 and number["accuracy"] > number["accuracy of the commoner label"]
    example = next(line for line in said.splitlines() if line.startswith("  {"))
    assert list(json.loads(example)) == ["f1", "f2", "f3", "f4", "label"]
    calls = re.search(r"^(\d+) tool calls from the open session", said, re.MULTILINE)
    assert calls and int(calls[1]) <= 4
    assert "2 DONE" in said
    await wait_until(lambda: not family(), within_s=120)


async def test_a_model_that_is_not_there_fails_the_demo_in_words() -> None:
    with anyio.fail_after(600):
        ran = await anyio.run_process([*DEMO, "--model", "/nowhere/model"], check=False)
    assert ran.returncode == 1
    assert (
        "The demo failed: create_session was refused. invalid_settings: there is no model folder" in ran.stdout.decode()
    )
    assert "/nowhere/model" in ran.stdout.decode()


@pytest.mark.parametrize("victim", ["stdio --in-process", "rhapsody_mcp demo"])
async def test_a_kill_in_the_middle_of_the_demo_leaves_nothing(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAMILY, uuid.uuid4().hex)
    with anyio.fail_after(600):
        async with await anyio.open_process(DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
            await wait_until(lambda: bool(family("vllm_launcher")))
            os.kill(family(victim)[0], signal.SIGKILL)
            assert await demo.wait() != 0
            await wait_until(lambda: not family(), within_s=120)


@pytest.mark.ci
async def test_a_kill_of_the_server_ends_both_engines_and_what_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAMILY, uuid.uuid4().hex)
    with anyio.fail_after(600):
        async with busy_server("dragon", "vllm") as server:
            assert family("vllm_launcher") and family("engine.host") and len(family("sleep 600")) >= 3
            server.kill()
            await wait_until(lambda: not family(), within_s=120)
