"""Functions that an agent registers by name, and what is refused."""

from __future__ import annotations

import asyncio

import pytest

from rhapsody_mcp.backends.base import Kind
from rhapsody_mcp.model.errors import BackendError, InvalidTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.functions import FunctionRegistry
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

SCALE = 'def scale(number, by=2):\n    """Multiplies.\n\n    More of it.\n    """\n    return number * by'


async def register(agent: Agent, source: str, **fields: str) -> dict[str, object]:
    return await agent.call("register_function", session="session-1", source=source, **fields)


async def results(agent: Agent, *tasks: dict[str, object]) -> dict[str, object]:
    await agent.call("submit_tasks", session="session-1", tasks=list(tasks))
    reply = await agent.call("wait_tasks", session="session-1", timeout_s=50)
    return {row["name"]: row["result"] for row in reply["done"]}


async def test_a_registered_function_is_used_by_its_name(agent: Agent) -> None:
    reply = await register(agent, SCALE)
    assert reply == {"function": "scale", "registered": {"scale": "scale(number, by=2)"}}
    assert "scale(number, by=2). Multiplies.\n" in agent.texts[-1]
    assert '{"function": "scale", "args": [...]}' in agent.texts[-1]
    done = await results(
        agent,
        {"name": "double", "function": "scale", "args": [4]},
        {"name": "triple", "function": "scale", "args": [{"ref": "double"}], "kwargs": {"by": 3}},
    )
    assert done == {"double": 8, "triple": 24}


async def test_a_name_of_its_own_and_an_entry_among_helpers(agent: Agent) -> None:
    await register(agent, SCALE)
    source = "def main(x):\n    return helper(x)\n\n\ndef helper(x):\n    return [x]"
    reply = await register(agent, source, name="boxed-v2", entry="main")
    assert reply == {"function": "boxed-v2", "registered": {"scale": "scale(number, by=2)", "boxed-v2": "main(x)"}}
    assert "Also registered: scale." in agent.texts[-1]
    assert await results(agent, {"name": "box", "function": "boxed-v2", "args": [1]}) == {"box": [1]}


async def test_registering_again_replaces_it_for_tasks_that_are_submitted_later(agent: Agent) -> None:
    await register(agent, "def version():\n    return 1")
    agent.backend.may_finish.clear()
    await agent.call("submit_tasks", session="session-1", tasks=[{"name": "early", "function": "version"}])
    agent.backend.may_finish.set()
    reply = await register(agent, "def version():\n    return 2")
    assert reply["registered"] == {"version": "version()"} and "It replaces an earlier one" in agent.texts[-1]
    assert await results(agent, {"name": "late", "function": "version"}) == {"early": 1, "late": 2}


async def test_the_check_is_no_task_of_the_session(agent: Agent) -> None:
    await register(agent, SCALE)
    assert (await agent.call("list_tasks", session="session-1"))["total"] == 0
    assert (await agent.call("list_sessions"))["sessions"][0]["counts"] == {}
    submitted = await agent.call("submit_tasks", session="session-1", tasks=[{"function": "scale", "args": [1]}])
    assert submitted["first"] == "task.000001"
    assert len(agent.backend.received) == 2


@pytest.mark.parametrize(
    ("source", "told"),
    [
        pytest.param("def f(x):\n    return x +", ["does not compile: line 2"], id="no Python"),
        pytest.param("x = 1", ["defines no function"], id="no function"),
        pytest.param(
            "def f():\n    import numpyy, json\n\n    def g():\n        from pandass.core import frame\n",
            ["f cannot run", "line 2: no module 'numpyy'", "line 5: no module 'pandass'", "do without what is missing"],
            id="modules that are missing, at any depth",
        ),
        pytest.param(
            "def f():\n    from math import squareroot",
            ["module 'math' has no 'squareroot'"],
            id="a name that is missing",
        ),
        pytest.param("from .near import x\n\n\ndef f():\n    pass", [".near is relative"], id="a relative import"),
        pytest.param(
            "LIMIT = 1 / 0\n\n\ndef f():\n    pass",
            ["its top level fails: ZeroDivisionError"],
            id="a failing top level",
        ),
        pytest.param("def f():\n    pass\n\n\nf = 3", ["its top level leaves no function 'f'"], id="a hidden function"),
    ],
)
async def test_what_cannot_run_is_refused_and_not_kept(agent: Agent, source: str, told: list[str]) -> None:
    text = await agent.refusal("register_function", session="session-1", source=source)
    assert text.startswith("invalid_task: ") and all(part in text for part in told), text
    unknown = await agent.refusal("submit_tasks", session="session-1", tasks=[{"function": "f"}])
    assert "no function is registered as 'f'" in unknown


async def test_imports_that_the_source_can_do_without_are_no_obstacle(agent: Agent) -> None:
    source = (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import numpyy\n\n\n"
        "def f():\n    try:\n        import cupyy as np\n    except ImportError:\n        import math as np\n"
        "    from os import path\n    import xml.dom\n    return np.pi"
    )
    assert (await register(agent, source))["function"] == "f"


@pytest.mark.parametrize("name", ["a:b", "two words", "x" * 65, "a\nb"])
async def test_a_name_that_could_not_be_used_is_refused(agent: Agent, name: str) -> None:
    text = await agent.refusal("register_function", session="session-1", source=SCALE, name=name)
    assert "valid are letters, digits, '_', '.' and '-'" in text


async def test_an_unknown_name_is_refused_with_the_nearest_one(agent: Agent) -> None:
    await register(agent, SCALE)
    text = await agent.refusal("submit_tasks", session="session-1", tasks=[{"function": "scael", "args": [1]}])
    assert "tasks[0]: no function is registered as 'scael' (did you mean 'scale'?). Registered: scale." in text
    assert "register_function" in text and '"package.module:function"' in text


async def test_arguments_are_checked_against_the_signature(agent: Agent) -> None:
    await register(agent, SCALE)
    text = await agent.refusal("submit_tasks", session="session-1", tasks=[{"function": "scale", "args": [1, 2, 3]}])
    assert "scale(number, by=2) does not take these arguments: too many positional arguments" in text


async def test_functions_belong_to_their_session(agent: Agent) -> None:
    await register(agent, SCALE)
    await agent.session()
    text = await agent.refusal("submit_tasks", session="session-2", tasks=[{"function": "scale", "args": [1]}])
    assert "no function is registered as 'scale'. Call register_function" in text


async def test_a_session_that_runs_no_functions_says_so() -> None:
    prompts_only: list[Kind] = ["prompt"]
    async with open_agent(backend=ScriptedBackend(lambda _, __: None, kinds=prompts_only)) as agent:
        await agent.session()
        text = await agent.refusal("register_function", session="session-1", source=SCALE)
        assert "scale: no backend of this session runs a function (scripted)" in text


async def test_a_worker_that_dies_of_the_source_is_told_as_that() -> None:
    def crash(_: TaskSpec, __: object) -> Outcome:
        return Outcome(state=TaskState.FAILED, ended=0, started=0, cause=Cause.CRASHED, error="signal 11")

    async with open_agent(backend=ScriptedBackend(crash)) as agent:
        await agent.session()
        text = await agent.refusal("register_function", session="session-1", source=SCALE)
        assert "ended the worker (crashed: signal 11)" in text


async def test_a_check_that_gets_no_worker_in_time_may_be_tried_again_later() -> None:
    class Starting(ScriptedBackend):
        async def start(self) -> None:
            await asyncio.Event().wait()

    async with Session([Starting(perform)]) as session:
        functions = FunctionRegistry(session)
        with pytest.raises(BackendError, match=r"no worker of backend 'scripted' was free .* within 0.01 s"):
            await functions.check(Source(SCALE), None, 0.01)
        assert functions.names == []


async def test_a_check_that_takes_too_long_says_where_long_work_belongs() -> None:
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    async with Session([backend]) as session:
        with pytest.raises(InvalidTask, match=r"did not end within 0.01 s.* do long work inside the function"):
            await FunctionRegistry(session).check(Source(SCALE), None, 0.01)


async def test_an_engine_that_does_not_start_is_told_as_that() -> None:
    broken = ScriptedBackend(lambda _, __: None, start_error=OSError("no room"))
    async with open_agent(backend=broken) as agent:
        await agent.session()
        text = await agent.refusal("register_function", session="session-1", source=SCALE)
        assert text.startswith("backend_unavailable: the function could not be checked") and "no room" in text
