"""Registered functions on real workers, and exported scripts that a fresh process runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from mcp import Client

from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import load
from rhapsody_mcp.runtime.backend_factory import open_backends
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.server import build_server
from rhapsody_mcp.settings import Settings
from tests.agents import Agent
from tests.backends.openai_stand_in import StandIn, serve

pytestmark = pytest.mark.anyio

KEY = "the-key"


@pytest.fixture(params=["dragon", "local"])
async def agent(request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    async with serve(StandIn()) as stand_in:
        settings = Settings(endpoint_url=stand_in.url, endpoint_api_key=KEY)
        async with SessionRegistry(partial(open_backends, settings=settings)) as sessions:
            async with Client(build_server(settings, sessions)) as client:
                agent = Agent(client, cast(Any, None), sessions)
                await agent.call("create_session", backends=[request.param, "endpoint"], num_workers=2)
                yield agent


def tasks_of(agent: Agent) -> list[Task]:
    return agent.sessions.get("session-1").session.tasks


async def submit(agent: Agent, *tasks: dict[str, Any]) -> None:
    await agent.call("submit_tasks", session="session-1", tasks=list(tasks))
    with anyio.fail_after(600):
        await agent.sessions.get("session-1").session.wait_tasks(tasks_of(agent))


def outcome_of(task: Task) -> dict[str, Any]:
    """As an exported script prints it."""
    assert task.outcome is not None
    if task.state is not TaskState.DONE:
        return {"state": task.state.value, "error": str(task.exception)}
    return {"state": "DONE", "result": None if task.outcome.value is None else load(task.outcome.value)}


async def run_script(file: str) -> dict[str, Any]:
    with anyio.fail_after(600):
        ran = await anyio.run_process([sys.executable, file], env=os.environ | {"ENDPOINT_API_KEY": KEY})
    assert ran.stderr == b""
    return cast(dict[str, Any], json.loads(ran.stdout))


async def test_the_exported_script_gives_the_results_of_the_session(agent: Agent, tmp_path: Path) -> None:
    statistics = "import statistics\n\nSCALE = 10\n\n\ndef mean(*values):\n    return SCALE * statistics.fmean(values)"
    await agent.call("register_function", session="session-1", source=statistics)
    note = str(tmp_path / "note.txt")
    await submit(
        agent,
        {"name": "total", "function": "builtins:sum", "args": [{"ref": "squares"}]},
        {"name": "squares", "for_each": {"ref": "numbers"}, "source": SQUARE, "args": [{"item": True}, "no-{item}"]},
        {"name": "numbers", "source": "def numbers(count):\n    return list(range(count))", "kwargs": {"count": 4}},
        {"name": "mean", "function": "mean", "args": [{"ref": "squares", "path": "/3"}, 1], "retries": 1},
        {"name": "object", "source": "def value():\n    return {1, 2}"},
        {"name": "size", "function": "builtins:len", "args": [{"ref": "object"}]},
        {"name": "role", "source": ROLE, "ranks": 2, "env": {"ROLE": "worker"}, "timeout_s": 30},
        {"name": "write", "executable": "/bin/sh", "arguments": ["-c", 'echo "$0" > "$1"', {"ref": "total"}, note]},
        {"name": "asked", "prompt": ["one", {"ref": "role"}], "temperature": 0},
        {"name": "each-asked", "for_each": [{"id": 1}, {"id": 2}], "prompt": "say {item}", "max_tokens": 20},
        {"name": "fail", "source": "def fail():\n    raise ValueError('seven')"},
        {"name": "lost", "function": "mean", "args": [{"ref": "fail"}]},
        {"name": "anyhow", "source": NOTHING, "args": [{"ref": "fail"}], "on_upstream_failure": "run"},
    )
    await submit(agent, {"name": "read", "executable": "/bin/cat", "arguments": [note]})
    reply = await agent.call("export_session", session="session-1", folder=str(tmp_path / "exports"))
    expected = {str(task.name): outcome_of(task) for task in tasks_of(agent)}
    assert expected["total"] == {"state": "DONE", "result": 14} and expected["mean"]["result"] == 50.0
    assert expected["read"]["result"] == "14" and expected["anyhow"]["result"] is True
    assert expected["squares"]["result"] == [0, 1, 4, 9] and expected["fail"]["state"] == "FAILED"
    os.unlink(note)
    ran = await run_script(reply["script"])
    assert expected.pop("object")["state"] == "DONE"
    assert ran.pop("object") == {"state": "DONE", "result": [1, 2]}  # a set, which JSON shows as a list
    for one in (expected, ran):
        for name in ("fail", "lost"):
            assert one[name].pop("error").endswith("ValueError: seven")  # the task's id comes first
    assert ran == expected


async def test_the_exported_script_prints_as_json_what_json_cannot_say(agent: Agent, tmp_path: Path) -> None:
    sources = {
        "keys": "def run():\n    return {1: 2, (1, 2): 3, 'a': {None: b'x'}}",
        "numbers": "def run():\n    return [float('nan'), float('inf'), -float('inf'), 1.5, 2, True, None]",
        "array": "def run():\n    import numpy\n\n    return {'all': numpy.arange(200.0), 'one': numpy.int64(3)}",
        "large": "def run():\n    import numpy\n\n    return numpy.zeros((100, 20))",
        "endless": "def run():\n    values = []\n    values.append(values)\n    return values",
    }
    await submit(agent, *({"name": name, "source": source} for name, source in sources.items()))
    reply = await agent.call("export_session", session="session-1", folder=str(tmp_path))
    ran = await run_script(reply["script"])
    assert [one for one in ran.values() if one["state"] != "DONE"] == []
    results = {name: one["result"] for name, one in ran.items()}
    assert results["keys"] == {"1": 2, "(1, 2)": 3, "a": {"None": "b'x'"}}
    assert results["numbers"] == ["NaN", "Infinity", "-Infinity", 1.5, 2, True, None]
    assert results["array"] == {"all": list(range(200)), "one": 3}
    assert results["large"] == "ndarray of shape (100, 20), dtype float64"
    assert results["endless"] == "list, which cannot be shown: RecursionError"


async def test_the_exported_script_repeats_what_used_a_replaced_task(agent: Agent, tmp_path: Path) -> None:
    source = "def run(number):\n    if number == 2:\n        raise ValueError(number)\n    return number"
    present = "def present(values):\n    return [value for value in values if value is not None]"
    sweep = {"name": "sweep", "for_each": [1, 2, 3], "source": source, "args": [{"item": True}]}
    best = {"name": "best", "source": present, "args": [{"ref": "sweep"}], "on_upstream_failure": "run"}
    await submit(agent, sweep, best, {"name": "nb", "source": present, "args": [{"ref": "sweep"}]})
    await submit(agent, sweep | {"for_each": [4, 5]})
    reply = await agent.call("export_session", session="session-1", folder=str(tmp_path))
    ran = await run_script(reply["script"])
    assert ran.pop("task.000001")["state"] == "FAILED"
    assert ran == {"best": {"state": "DONE", "result": [1, 3]}, "sweep": {"state": "DONE", "result": [4, 5]}}


SQUARE = "def square(number, label):\n    assert label == f'no-{number}'\n    return number**2"
ROLE = "def role():\n    import os\n\n    return os.environ['ROLE']"
NOTHING = "def is_nothing(value):\n    return value is None"


async def test_a_worker_looks_for_the_modules_of_a_function_that_is_registered(agent: Agent) -> None:
    source = "def solve():\n    import json\n    import solver_of_nobody\n\n    return solver_of_nobody.solve()"
    text = await agent.refusal("register_function", session="session-1", source=source)
    assert "solve cannot run on the workers: line 3: no module 'solver_of_nobody' is installed" in text
    crash = "import os\n\nos._exit(3)\n\n\ndef solve():\n    pass"
    assert "ended the worker (crashed: " in await agent.refusal("register_function", session="session-1", source=crash)
    kept = await agent.call("register_function", session="session-1", source=source.replace("solver_of_nobody", "math"))
    assert kept["registered"] == {"solve": "solve()"} and tasks_of(agent) == []
