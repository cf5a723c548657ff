"""How an agent asks for JSON and for files, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import MCPError
from mcp.types import TextResourceContents

from rhapsody_mcp.engine.messages import FunctionResult
from rhapsody_mcp.engine.task.function_call import encode
from rhapsody_mcp.engine.task.kept_files import with_outputs
from rhapsody_mcp.model.specs import Call, Command
from rhapsody_mcp.settings import Settings
from tests.agents import Agent, open_agent, outcome_of

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
WRITE = "def write(n):\n    with open(f'out-{n}.txt', 'w') as file:\n        file.write('x' * n)\n    return n"
PROGRAM = {"executable": "echo", "arguments": ['{"loss": 0.5}'], "stdout": "json"}


async def test_a_program_and_a_function_carry_what_was_asked_for(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = {"source": WRITE, "args": [{"item": True}], "for_each": [1, 2], "outputs": ["out-{item}.txt"]}
    await agent.call("submit_tasks", **SESSION, tasks=[{**PROGRAM, "outputs": ["a.json"]}, sweep])
    await agent.call("wait_tasks", **SESSION)
    program, *calls = (run.spec.work for run in agent.backend.received)
    assert isinstance(program, Command) and (program.stdout, program.outputs) == ("json", ("a.json",))
    assert [call.outputs for call in calls if isinstance(call, Call)] == [("out-1.txt",), ("out-2.txt",)]


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (
            {"source": WRITE, "stdout": "json"},
            "stdout has no effect on a task with source; it belongs to",
        ),
        ({"prompt": "x", "outputs": ["a"]}, "outputs has no effect on a task with prompt"),
        ({"executable": "ls", "outputs": ["/tmp/x"]}, "'/tmp/x' in outputs is no pattern of files below"),
        ({"executable": "ls", "outputs": ["a/../../x"]}, "is no pattern of files below"),
        ({"executable": "ls", "outputs": ["a\0b"]}, "is no pattern of files below"),
        ({"executable": "ls", "outputs": ["{item}"]}, "{item}"),
        ({"executable": "ls", "stdout": "text"}, "stdout"),
    ],
)
async def test_what_cannot_be_is_refused(agent: Agent, task: dict[str, Any], told: str) -> None:
    assert told in await agent.refusal("submit_tasks", **SESSION, tasks=[task])


async def test_an_exported_script_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_agent() as agent:
        await agent.call("create_session", backends=["local"])
        tasks = [
            {**PROGRAM, "name": "program"},
            {
                "name": "sweep",
                "source": WRITE,
                "args": [{"item": True}],
                "for_each": [3, 4],
                "outputs": ["out-{item}.txt"],
            },
        ]
        await agent.call("submit_tasks", **SESSION, tasks=tasks)
        await agent.call("wait_tasks", **SESSION)
        reply = await agent.call("export_session", **SESSION, folder=str(tmp_path))
    script = await anyio.Path(reply["script"]).read_text()
    assert "stdout='json'" in script and "outputs=['out-' + text(item) + '.txt']" in script
    ended = await anyio.run_process([sys.executable, reply["script"]])
    results = json.loads(ended.stdout)
    assert results["program"]["result"] == {"loss": 0.5}
    assert [run["result"] for run in results["sweep"]["result"]] == [3, 4]


async def test_results_texts_and_json_in_files_are_read_without_a_worker(tmp_path: Path) -> None:
    """Every task of the backend, also one that would look at an object, ends with this result."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "r.json").write_text('{"loss": 0.5, "a/b": [1, 2]}')
    (tmp_path / "plots" / "a.json").write_text('{"k": 3}')
    (tmp_path / "plots" / "long.txt").write_text("ä" * 20_000)
    returned = FunctionResult(encode({"x": [7, 8]}, str(tmp_path)))
    value = with_outputs(returned, ["*.json", "plots/*"], str(tmp_path), str(tmp_path), None).value
    async with open_agent(backend=outcome_of(value=value)) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "run", "prompt": "x"}])
        waited = await agent.call("wait_tasks", **SESSION)
        assert '"long.txt":"file, 40000 bytes"}' in waited["done"][0]["preview"]
        assert "(result and 3 files, " in agent.texts[-1]

        async def part(path: str, **page: Any) -> Any:
            return await agent.call("get_result", **SESSION, task="run", path=path, **page)

        assert (await part("/result/x/1"))["result"] == 8
        assert (await part("/files/r.json"))["result"].startswith('{"loss"')
        assert (await part("/files/r.json/loss"))["result"] == 0.5
        assert (await part("/files/r.json/a~1b/-1"))["result"] == 2
        assert (await part("/files/plots/a.json/k"))["result"] == 3 == (await part("/files/plots~1a.json/k"))["result"]
        text = await part("/files/plots/long.txt", start=19_999)
        assert (text["result"], text["total"]) == ("ä", 20_000)
        for path, told in {
            "/files/r.json/b": "keys ['loss', 'a/b']",
            "/files/plots/long.txt/x": "long.txt, which is no JSON",
            "/result/y": "keys ['x']",
        }.items():
            assert told in await agent.refusal("get_result", **SESSION, task="run", path=path)
        assert value is not None
        await anyio.Path(value.files["r.json"]).unlink()
        assert "is gone" in await agent.refusal("get_result", **SESSION, task="run", path="/files/r.json")


async def test_results_with_files_that_are_too_long_together_fail_their_list(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("x" * 100_000)
    long, short = (
        with_outputs(FunctionResult(encode("y" * length, "")), ["*.txt"], str(tmp_path), str(tmp_path), None).value
        for length in (1000, 10)
    )
    each = {"name": "each", "prompt": {"item": True}, "for_each": ["a", "b", "c"]}
    for value, state in ((long, "FAILED"), (short, "DONE")):
        async with open_agent(backend=outcome_of(value=value), settings=Settings(max_result_bytes=2048)) as agent:
            await agent.session()
            await agent.call("submit_tasks", **SESSION, tasks=[each])
            await agent.call("wait_tasks", **SESSION)
            whole = await agent.call("get_result", **SESSION, task="each")
            assert whole["state"] == state
            assert value is short or "3,006 bytes together, and one result has 2,048 at most" in whole["error"]


async def test_a_result_and_its_parts_are_resources(agent: Agent) -> None:
    source = "def run():\n    return {'x': [7, {'a/b': 'text'}]}"
    tasks = [{"name": "run", "source": source}, {"name": "failed", "source": "def f():\n    return 1 / 0"}]
    await agent.call("submit_tasks", **SESSION, tasks=tasks)
    await agent.call("wait_tasks", **SESSION)

    async def read(path: str) -> Any:
        (content,) = (await agent.client.read_resource(f"rhapsody://sessions/session-1/tasks/{path}")).contents
        assert isinstance(content, TextResourceContents) and content.mime_type == "application/json"
        return json.loads(content.text)

    assert await read("run/result") == {"x": [7, {"a/b": "text"}]}
    assert await read("run/result/x/0") == 7 and await read("run/result/x/-1/a~1b") == "text"
    assert await read("failed/result") is None
    for path, told in {"run/result/y": "keys ['x']", "none/result": "unknown_task"}.items():
        with pytest.raises(MCPError, match=re.escape(told)):
            await read(path)
