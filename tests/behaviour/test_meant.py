"""What is clear is taken as it is meant, and words of other systems lead to ours."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.machine import inspect_machine
from rhapsody_mcp.model.specs import Call, Command
from rhapsody_mcp.schedulers.detection import FoundScheduler
from rhapsody_mcp.schedulers.slurm import Slurm
from rhapsody_mcp.toolsets import vocabulary
from tests.agents import Agent, open_agent

pytestmark = pytest.mark.anyio
SESSION = {"session": "session-1"}
MACHINE = inspect_machine()
DOUBLE = "def double(number):\n    return 2 * number"


async def submit(agent: Agent, *tasks: dict[str, Any]) -> Any:
    return await agent.call("submit_tasks", **SESSION, tasks=list(tasks))


async def refusal(agent: Agent, *tasks: dict[str, Any]) -> str:
    return await agent.refusal("submit_tasks", **SESSION, tasks=list(tasks))


async def test_null_is_absent_in_every_tool(agent: Agent) -> None:
    told = {"name": "echo", "executable": "/bin/echo", "arguments": None, "process": None, "retries": None, "x": None}
    job = {"source": DOUBLE, "args": [1], "process_templates": [{"ranks": 2, "cwd": None, "env": {"A": None}}]}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("create_session", {"name": "other", "environment": {"variables": {"A": None}, "setup": None}, "model": None}),
        ("submit_tasks", {"tasks": [told, job], "dry_run": None, "force": None, "idempotency_key": None}),
        ("wait_tasks", {"tasks": None, "state": None, "timeout_s": None, "nobody": None}),
        ("list_tasks", {"limit": None, "cursor": None}),
        ("get_result", {"task": "echo", "path": None, "output": None}),
        ("get_statistics", {"group": None}),
        ("close_session", {"force": None}),
    ]
    for tool, arguments in calls:
        await agent.call(tool, **({} if tool == "create_session" else SESSION), **arguments)
    first, second = (order.spec for order in agent.backend.received)
    assert (first.work, first.layout.forked) == (Command("/bin/echo"), True)
    assert second.layout.templates[0].env == {"A": None}, "a variable that is null is removed"


async def test_null_among_data_stays(agent: Agent) -> None:
    await submit(
        agent, {"name": "kept", "source": "def f(a, b):\n    return [a, b]", "args": [None], "kwargs": {"b": None}}
    )
    await submit(agent, {"name": "whole", "source": DOUBLE, "args": [{"ref": "kept", "path": None}]})
    await agent.call("wait_tasks", **SESSION)
    assert (await agent.call("get_result", **SESSION, task="kept"))["result"] == [None, None]


async def test_a_lone_task_and_a_lone_name_stand_for_lists_of_one(agent: Agent) -> None:
    await agent.call("submit_tasks", **SESSION, tasks={"name": "first", "executable": "/bin/echo"})
    await submit(agent, {"name": "then", "executable": "/bin/echo", "after": "first"})
    reply = await agent.call("wait_tasks", **SESSION, tasks="then")
    assert [row["name"] for row in reply["done"]] == ["then"]
    assert (await agent.call("cancel_tasks", **SESSION, tasks="then"))["had_ended"] == 1


async def test_choices_may_be_in_any_letter_case(agent: Agent) -> None:
    await submit(agent, {"name": "first", "executable": "/bin/echo", "on_upstream_failure": "Run"})
    assert (await agent.call("wait_tasks", **SESSION, state="Open"))["ended"]
    assert (await agent.call("list_tasks", **SESSION, state="done"))["total"] == 1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *(("code", "source"), ("depends_on", "after"), ("command", "executable"), ("working-dir", "cwd")),
        *(("walltime", "timeout_s"), ("cpus", "cores"), ("system", "system_prompt"), ("max_new_tokens", "max_tokens")),
        *(("promt", "prompt"), ("Environment", "env"), ("response_format", "json_schema")),
    ],
)
async def test_words_of_other_systems_lead_to_ours(theirs: str, ours: str) -> None:
    async with open_agent() as agent:
        await agent.session()
        told = await refusal(agent, {"executable": "/bin/echo", theirs: 1})
        assert f"tasks[0] has no field {theirs!r} (did you mean {ours!r}?)." in told


async def test_arguments_of_other_words_lead_to_ours(agent: Agent) -> None:
    for tool, theirs, ours in (("wait_tasks", "task_ids", "tasks"), ("get_result", "name", "task")):
        told = await agent.refusal(tool, **SESSION, **{theirs: "x"})
        assert f"{tool} has no argument {theirs!r} (did you mean {ours!r}?)." in told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            "nodes",
            f"tasks run on this one machine, {MACHINE.host}, which has {MACHINE.cores} cores; ranks",
        ),
        ("partition", "there is no batch system here"),
    ],
)
async def test_what_there_is_not_names_what_there_is_and_who_can_help(
    asked: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "choose_scheduler", lambda: FoundScheduler(None))
    async with open_agent() as agent:
        await agent.session()
        text = await refusal(agent, {"executable": "/bin/echo", asked: 2})
        assert f"tasks[0] has no field {asked!r}: {told}" in text
        assert "person" in text and "Valid: name, source, " in text


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("nodes", "the session has the nodes, as with create_session(nodes=2)"),
        ("qos", "it belongs into scheduler of create_session"),
    ],
)
async def test_with_a_scheduler_what_a_session_asks_for_is_named(
    asked: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "choose_scheduler", lambda: FoundScheduler(Slurm()))
    async with open_agent() as agent:
        await agent.session()
        assert told in await refusal(agent, {"executable": "/bin/echo", asked: 2})


@pytest.mark.parametrize("is_cluster", [True, False])
async def test_a_session_that_asks_for_gpus_or_memory_is_told_that_tasks_do(
    is_cluster: bool, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "choose_scheduler", lambda: FoundScheduler(Slurm() if is_cluster else None))
    text = await agent.refusal("create_session", gpus=2)
    here = f"this machine has {len(MACHINE.gpus)}" if MACHINE.gpus else "this machine has no GPU. Prompts can go to"
    assert ('as with create_session(nodes=1, scheduler={"gpus_per_node": 4})' if is_cluster else here) in text
    assert "with memory_gb" in await agent.refusal("create_session", memory_gb=2)


async def test_the_valid_fields_are_listed_once(agent: Agent) -> None:
    text = await refusal(agent, *({"name": f"t{n}", "code": DOUBLE, "depends_on": []} for n in range(5)))
    assert "tasks[0] ('t0') and tasks[1] ('t1') and 3 more have no field 'code' (did you mean 'source'?)." in text
    assert "have no field 'depends_on' (did you mean 'after'?). Valid: name, source, entry, function, " in text
    assert text.count("Valid: ") == 1
    idle = await refusal(agent, *({"source": DOUBLE, "args": [1], "temperature": 1} for _ in range(3)))
    assert (
        idle.count("temperature has no effect on a task with source; it belongs to one with prompt or messages.") == 3
    )


async def test_args_as_an_object_leads_to_kwargs(agent: Agent) -> None:
    text = await refusal(agent, {"source": DOUBLE, "args": {"number": 1}})
    assert 'tasks[0].args must be a list, as in [2, {"ref": "samples"}], not {"number": 1}.' in text
    assert "Arguments by name go into kwargs." in text
    await submit(agent, {"name": "ok", "source": DOUBLE, "kwargs": {"number": 1}})
    assert isinstance(agent.backend.received[0].spec.work, Call)
