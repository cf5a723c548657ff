"""A result whose file somebody deleted: everyone who needs it says so in words, and nobody breaks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError

from rhapsody_mcp.engine.isolation.sources import Sources
from rhapsody_mcp.engine.task.function_call import perform as perform_call
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import open_agent, perform

pytestmark = pytest.mark.anyio

ONE: dict[str, Any] = {"session": "session-1"}


def with_file(file: Path) -> ScriptedBackend:
    """Its first task leaves a list in that file, and has printed into it too."""

    def script(spec: TaskSpec, values: list[Any]) -> Any:
        if spec.uid != "task.000001":
            return perform(spec, values)
        value = Value("json", "list", 7, None, str(file), 3)
        stdout = Stream("the end", str(file), 7)
        return Outcome(state=TaskState.DONE, started=1.0, ended=2.0, value=value, stdout=stdout)

    return ScriptedBackend(script)


async def test_get_result_for_each_and_resources_tell_that_the_file_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "result"
    file.write_text("[1,2,3]")
    gone = f"the file of this result, {file}, is gone; submit its task again"
    async with open_agent(backend=with_file(file)) as agent:
        await agent.session()
        await agent.call("submit_tasks", **ONE, tasks=[{"name": "list", "function": "math:sqrt", "args": [4]}])
        await agent.call("wait_tasks", **ONE)
        assert (await agent.call("get_result", **ONE, task="list"))["result"] == [1, 2, 3]
        file.unlink()
        text = await agent.refusal("get_result", **ONE, task="list")
        assert text.startswith(f"result_gone: {gone}") and "submit_tasks for its task again" in text
        printed = await agent.call("get_result", **ONE, task="list", output="tail")
        assert f"(its file, {file}, is gone; this was its end)\nthe end" in printed["stdout"]
        sweep = {"name": "sweep", "function": "math:sqrt", "args": [{"item": True}], "for_each": {"ref": "list"}}
        await agent.call("submit_tasks", **ONE, tasks=[sweep])
        (failure,) = (await agent.call("wait_tasks", **ONE, tasks=["sweep"]))["failures"]
        assert failure["cause"] == "invalid" and gone in failure["error"]
        with pytest.raises(MCPError, match="is gone; submit its task again"):
            await agent.client.read_resource("rhapsody://sessions/session-1/tasks/list")


def test_a_function_that_needs_it_cannot_start_and_says_why(tmp_path: Path) -> None:
    class WithReference(pickle.Pickler):
        def persistent_id(self, item: object) -> tuple[str, str] | None:
            return ("task.000001", "") if item == "reference" else None

    with (tmp_path / "arguments").open("wb") as file:
        WithReference(file).dump((("reference",), {}))
    call = Call("module", b"builtins:len", "", (tmp_path / "arguments").read_bytes())
    bound = {"task.000001": Value("json", "list", 7, None, str(tmp_path / "gone"), 3)}
    result = perform_call(call, bound, str(tmp_path), Sources(str(tmp_path / "sources")))
    told = f"it cannot start: the file of this result, {tmp_path}/gone, is gone; submit its task again."
    assert (result.cause, result.error) == (Cause.INVALID, told)
