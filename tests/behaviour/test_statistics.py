"""What an agent reads of how its tasks did, and of the machine."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, ComputeTask, Session
from rhapsody_mcp.machine import inspect_machine
from rhapsody_mcp.model.outcome import Outcome, Usage
from rhapsody_mcp.model.specs import Call, Command, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value
from rhapsody_mcp.runtime.tasks import ForEach
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import ERAS, Agent, open_agent

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
BASE = float(round(time.time()) + 1_000_000)
"""Later than every submission of these tests, and so round that half seconds after it are exact."""
TWO_ITEMS = Value("json", "list", 5, b"[1,2]", length=2)


class Clocked(ScriptedBackend):
    """Has two workers. A task's text says from when to when it ran, as in "0 to 4.5", and whether it fails."""

    num_workers = 2

    def __init__(self) -> None:
        super().__init__(clocked, name="dragon")


def clocked(spec: TaskSpec, values: list[Any]) -> Outcome:
    told = said(spec)
    started, ended = (BASE + float(number) for number in re.findall(r"[\d.]+", told)[:2])
    if "fails" in told:
        return Outcome(state=TaskState.FAILED, started=started, ended=ended, cause=Cause.ERROR, error="as told")
    usage = Usage(100, 20) if "prompt" in told else None
    return Outcome(state=TaskState.DONE, started=started, ended=ended, value=TWO_ITEMS, usage=usage)


def said(spec: TaskSpec) -> str:
    if isinstance(spec.work, Call):
        return spec.work.code.decode()
    return str(spec.work.arguments[0] if isinstance(spec.work, Command) else spec.work.prompts[0])


def program(name: str, when: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "executable": "sim", "arguments": [when], **more}


def function(name: str, when: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": f"# {when}\ndef run():\n    pass", **more}


async def statistics(agent: Agent, *tasks: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    await agent.session()
    await agent.call("submit_tasks", **SESSION, tasks=list(tasks))
    await agent.call("wait_tasks", **SESSION, timeout_s=50)
    return await agent.call("get_statistics", **SESSION, **arguments)


def submitted(agent: Agent, name: str) -> float:
    found = agent.sessions.get("session-1").task(name).submitted
    assert found is not None
    return found


@pytest.mark.parametrize("era", ERAS)
async def test_statistics_give_counts_times_and_rates_of_what_ran(era: str) -> None:
    async with open_agent(era, Clocked()) as agent:
        reply = await statistics(
            agent,
            function("a", "0 to 4"),
            function("b", "1 to 2"),
            function("c", "2 to 8, fails"),
            function("never", "9 to 9", after=["c"]),
        )
        queue = BASE + 1 - sum(submitted(agent, name) for name in "abc") / 3
    assert (reply["total_tasks"], reply["ran"]) == (4, 3)
    assert reply["counts"] == {"DONE": 2, "FAILED": 1, "CANCELED": 1}
    times = reply["times_s"]
    assert times["execution"] == {"mean": 3.666667, "p50": 4, "p95": 6, "p99": 6, "max": 6}
    assert times["queue"]["mean"] == pytest.approx(queue, abs=1e-6)
    assert times["total"]["mean"] == times["queue"]["mean"] + times["execution"]["mean"]
    assert reply["tasks_per_s"] == 0.375
    assert reply["busy"] == [{"backend": "dragon", "of": "workers", "places": 2, "share": 0.6875, "seconds": 11}]
    text = agent.texts[-1]
    assert text.startswith("session-1: 4 tasks (2 DONE, 1 FAILED, 1 CANCELED), ")
    assert "Mean of the 3 that ran and ended: total " in text and " + execution 3.67 s." in text
    assert "0.375 tasks a second while they ran. dragon: 69% of 2 workers busy." in text
    assert re.search(r"^function tasks +4 +1 .* 4\.000/6\.000/6\.000 .* 0\.375$", text, re.M)


async def test_tokens_are_counted_over_the_time_in_which_prompts_ran() -> None:
    async with open_agent(backend=Clocked()) as agent:
        reply = await statistics(
            agent,
            {"prompt": "prompt, 0 to 4"},
            {"prompt": "prompt, 2 to 5"},
            {"prompt": "prompt, 9 to 10"},
            program("wait", "0 to 100"),
        )
    assert reply["tokens"] == {"prompt_tokens": 300, "completion_tokens": 60, "in_per_s": 50, "out_per_s": 10}
    assert "Tokens: 300 in, 60 out, a second 50.0 in and 10.0 out." in agent.texts[-1]


async def test_the_critical_path_names_the_chain_that_took_the_time() -> None:
    async with open_agent(backend=Clocked()) as agent:
        reply = await statistics(
            agent,
            program("make", "0 to 2"),
            program("quick", "0 to 1"),
            program("train", "3 to 9", after=["make", "quick"]),
            program("beside", "0 to 8"),
        )
        first = BASE - submitted(agent, "make")
    path = reply["critical_path"]
    assert [(step["task"], step["execution_s"]) for step in path["steps"]] == [("make", 2), ("train", 6)]
    assert [step["queue_s"] for step in path["steps"]] == [pytest.approx(first, abs=1e-6), 1]
    assert path["seconds"] == pytest.approx(first + 9, abs=1e-6) and path["steps_left_out"] == 0
    assert path["seconds"] <= reply["makespan_s"] + 1e-6
    assert re.search(r"^Critical path: .* > train 7\.00 s \(queue 1\.00 s\)\.$", agent.texts[-1], re.M)


async def test_a_task_that_was_submitted_late_is_told_apart_from_one_that_waited() -> None:
    async with open_agent(backend=Clocked()) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[program("first", "0 to 1")])
        await agent.call("wait_tasks", **SESSION)
        first = agent.sessions.get("session-1").task("first")
        assert first.outcome is not None and first.submitted is not None
        first.submitted, first.outcome = 10.0, Outcome(state=TaskState.DONE, started=11.0, ended=12.0)
        await agent.call("submit_tasks", **SESSION, tasks=[program("second", "0 to 1", after=["first"])])
        await agent.call("wait_tasks", **SESSION)
        (_, step) = (await agent.call("get_statistics", **SESSION))["critical_path"]["steps"]
        assert step["unsubmitted_s"] == pytest.approx(submitted(agent, "second") - 12, abs=1e-5)
    assert "second" in agent.texts[-1] and "(not submitted " in agent.texts[-1]
    assert re.search(r"^Critical path: .* s of .* s, .* s of it not submitted: ", agent.texts[-1], re.M)


async def test_the_time_between_submissions_is_told_apart_and_no_backend_is_idle_in_it() -> None:
    async with open_agent(backend=Clocked()) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[function("first", "0 to 1"), function("second", "0 to 1")])
        await agent.call("wait_tasks", **SESSION, timeout_s=50)
        for name, (at, end) in {"first": (10.0, 14.0), "second": (94.0, 98.0)}.items():
            task = agent.sessions.get("session-1").task(name)
            task.submitted, task.outcome = at, Outcome(state=TaskState.DONE, started=at, ended=end)
        reply = await agent.call("get_statistics", **SESSION)
    assert (reply["makespan_s"], reply["idle_s"]) == (88, 80)
    assert reply["busy"] == [{"backend": "dragon", "of": "workers", "places": 2, "share": 0.5, "seconds": 8}]
    assert ", 80.00 s of it between submissions, with nothing to do: busy shares leave that out." in agent.texts[-1]


async def test_a_long_path_shows_its_longest_steps() -> None:
    chain = [program("t0", "0 to 1"), *(program(f"t{n}", f"{n} to {n + 1}", after=[f"t{n - 1}"]) for n in range(1, 30))]
    chain[7]["arguments"] = ["7 to 7.5"]
    async with open_agent(backend=Clocked()) as agent:
        path = (await statistics(agent, *chain))["critical_path"]
    assert (len(path["steps"]), path["steps_left_out"]) == (20, 10)
    assert [step["task"] for step in path["steps"]] == [f"t{n}" for n in range(21) if n != 7]
    assert "the 6 longest of its 30 tasks: t0 " in agent.texts[-1]


async def test_groups_are_bounded_slowest_first_and_can_be_asked_for_alone() -> None:
    tasks = [
        program(f"{letter}-{n}", f"{n} to {n + place}") for place, letter in enumerate("abcdefghijkl") for n in (1, 2)
    ]
    async with open_agent(backend=Clocked()) as agent:
        reply = await statistics(agent, *tasks)
        assert list(reply["groups"]) == list("lkjihgfedc") and reply["groups_left_out"] == 2
        assert reply["groups"]["l"]["times_s"]["execution"]["p99"] == 11
        text = agent.texts[-1]
        assert len(text.splitlines()) == 15 and "and 4 quicker groups" in text
        assert re.search(r"^all +24 +0 ", text, re.M)
        one = await agent.call("get_statistics", **SESSION, group="a")
        assert (one["group"], one["total_tasks"], one["times_s"]["execution"]["max"]) == ("a", 2, 0)
        assert agent.texts[-1].startswith("a of session-1: 2 tasks (2 DONE), ")
        refusal = await agent.refusal("get_statistics", **SESSION, group="aa")
    assert refusal.startswith("unknown_group: unknown group 'aa'") and "Valid: a, b, c" in refusal


async def test_the_children_of_a_for_each_count_and_it_does_not() -> None:
    async with open_agent(backend=Clocked()) as agent:
        reply = await statistics(
            agent,
            program("items", "0 to 1"),
            program("sweep", "{item} to 3", for_each={"ref": "items"}),
            program("end", "3 to 4", after=["sweep"]),
        )
    assert (reply["total_tasks"], reply["counts"]) == (4, {"DONE": 4})
    assert {name: group["tasks"] for name, group in reply["groups"].items()} == {"sweep": 2, "executable tasks": 2}
    assert [step["task"] for step in reply["critical_path"]["steps"]] == ["items", "sweep[0]", "end"]


async def test_before_anything_has_ended_statistics_only_count() -> None:
    backend = Clocked()
    backend.may_finish.clear()
    async with open_agent(backend=backend) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[program("held", "0 to 1")])
        reply = await agent.call("get_statistics", **SESSION)
        text = agent.texts[-1]
    assert reply["total_tasks"] == 1 and reply["ran"] == 0 and sum(reply["counts"].values()) == 1
    assert text.startswith("session-1: 1 task (1 ") and text.endswith("None has run and ended yet.")


async def test_a_python_user_gets_the_same_under_the_keys_of_the_tutorial_and_more() -> None:
    items = ForEach(
        [0, 1, 2], lambda item, number: ComputeTask(executable="sim", arguments=[f"{item} to 3"]), name="sweep"
    )
    asked = AITask("prompt, 3 to 5", after=[items])
    async with Session([Clocked()]) as session:
        await session.submit_tasks([items, asked])
        await session.wait_tasks([items, asked])
        told = session.get_statistics()
        assert told["summary"]["total_tasks"] == 4 and dict(told["counts"]) == {"DONE": 4} == session.counts
        assert f"{told['summary']['avg_execution']:.4f}" == "2.0000"
        assert told["times"]["execution"]["p95"] == 3 and told["throughput"] == 0.8
        assert told["busy"] == [{"backend": "dragon", "of": "cores", "places": 2, "share": 1.0, "seconds": 6}]
        assert list(told["groups"]) == ["sweep", "prompt tasks"]
        assert session.get_statistics(group="sweep")["ran"] == 3


# --- the machine


@pytest.mark.parametrize("era", ERAS)
async def test_the_system_is_described_in_plain_words(era: str) -> None:
    async with open_agent(era) as agent:
        reply = await agent.call("describe_system")
    machine, text = inspect_machine(), agent.texts[-1]
    assert reply["cores"] == machine.cores and f"{machine.cores} cores" in text
    assert [backend["name"] for backend in reply["backends"]] == ["dragon", "local", "vllm", "endpoint"]
    assert all(backend["works"] or backend["missing"] in text for backend in reply["backends"])
    assert all(
        f"{backend['name']} {backend['version']}" in text for backend in reply["backends"] if "version" in backend
    )
    assert "- local works here: functions and executables" in text
    assert reply["mpi"].startswith("MPI jobs ") and reply["mpi"] in text
    assert "Default model: the shipped model rhapsody-tiny, for trials: it writes one kind of labelled JSON" in text


async def test_the_system_names_the_limits_that_the_settings_put_on_an_agent() -> None:
    async with open_agent(settings=Settings(wait_cap_s=20, budget_tasks=500, budget_tokens=None)) as agent:
        reply = await agent.call("describe_system")
    assert {"default_model": "shipped", "wait_cap_s": 20, "budget_tasks": 500}.items() <= reply["settings"].items()
    assert "budget_tokens" not in reply["settings"]
    assert "One wait_tasks waits 20 s at most. Above 500 tasks in a session, submit_tasks asks" in agent.texts[-1]
