"""What cannot work is refused when it is asked for, in words that name the value, the setting, or what is valid."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import PutSession, PutTasks, SessionRow, TaskEnded, TaskRow, TaskStarted
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.runtime.session.managed_backend import EngineNotice
from rhapsody_mcp.settings import Settings
from tests.agents import open_agent, outcome_of

pytestmark = pytest.mark.anyio

ONE: dict[str, Any] = {"session": "session-1"}
SQRT = {"function": "math:sqrt", "args": [4]}


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (SQRT | {"name": "task.000001"}, "names of this form are the ids that the server gives"),
        (SQRT | {"name": "task.7"}, "names of this form are the ids"),
        ({"executable": ""}, "executable is ''; valid is a path, or a name on PATH"),
        ({"executable": "a\0b"}, "executable is 'a\\x00b'; valid is"),
        ({"executable": "echo", "arguments": ["a\0b"]}, "'a\\x00b' among arguments holds a NUL character"),
        ({"executable": "echo", "env": {"A": "b\0"}}, "env A is 'b\\x00'; valid is a text"),
        (SQRT | {"process_templates": []}, 'process_templates is empty; give at least one group, as in [{"ranks": 2}]'),
    ],
)
async def test_a_task_that_cannot_work_is_refused(task: dict[str, Any], told: str) -> None:
    async with open_agent() as agent:
        await agent.session()
        assert told in await agent.refusal("submit_tasks", **ONE, tasks=[task])


@pytest.mark.parametrize("name", ["task.one", "task.1b", "mytask.000001", "task."])
async def test_other_names_with_task_in_them_are_taken(name: str) -> None:
    async with open_agent() as agent:
        await agent.session()
        assert (await agent.call("submit_tasks", **ONE, tasks=[SQRT | {"name": name}]))["submitted"] == 1


@pytest.mark.parametrize("url", ["nowhere", "ftp://host/v1", "http://", "127.0.0.1:8000/v1", "http://host:port/v1"])
def test_an_address_that_is_none_of_an_http_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="valid is the address of an HTTP server"):
        plan_backends(SessionConfig(backends=("endpoint",), endpoint_url=url), Settings())


async def test_a_hard_limit_refuses_before_a_person_is_asked_to_go_over_the_budget() -> None:
    settings = Settings(budget_tasks=1, max_session_tasks=2)
    async with open_agent(settings=settings) as agent:
        await agent.session()
        text = await agent.refusal("submit_tasks", **ONE, tasks=[SQRT] * 3)
        assert text.startswith("limit_exceeded: ") and "max_session_tasks" in text
        text = await agent.refusal("submit_tasks", **ONE, tasks=[SQRT] * 2)
        assert text.startswith("needs_force: ") and "its budget is 1 (budget_tasks in the server's settings)" in text


@pytest.mark.parametrize(
    ("settings", "key"), [(Settings(default_task_s=5), "default_task_s"), (Settings(max_task_s=5), "max_task_s")]
)
async def test_a_timeout_that_nobody_asked_for_names_its_setting(settings: Settings, key: str) -> None:
    late = outcome_of(state=TaskState.FAILED, cause=Cause.TIMEOUT, error="its time of 5.0 s was up")
    async with open_agent(backend=late, settings=settings) as agent:
        await agent.session()
        tasks = [SQRT | {"name": "usual"}, SQRT | {"name": "asked", "timeout_s": 5}]
        await agent.call("submit_tasks", **ONE, tasks=tasks)
        await agent.call("wait_tasks", **ONE)
        usual, asked = [(await agent.call("get_result", **ONE, task=name))["error"] for name in ("usual", "asked")]
        assert usual == f"its time of 5.0 s was up ({key} in the settings of this server; it had no timeout_s)"
        assert asked == "its time of 5.0 s was up"
        assert f"{key} 5" in (await agent.call("describe_system") and agent.texts[-1])


async def test_a_notice_is_told_once_and_not_where_a_failure_tells_it() -> None:
    failing = outcome_of(state=TaskState.FAILED, cause=Cause.LOST, error="backend 'x' did not start: no luck")
    async with open_agent(backend=failing) as agent:
        await agent.session()
        notices = agent.sessions.get("session-1").session.notices
        said = ["lost its engine", "lost its engine", "backend 'x' did not start: no luck"]
        notices += [EngineNotice(time.time(), text) for text in said]
        await agent.call("submit_tasks", **ONE, tasks=[SQRT])
        assert (await agent.call("wait_tasks", **ONE))["notes"] == ["lost its engine"]


async def test_a_dry_run_looks_for_a_relative_cwd_in_the_folder_of_the_session(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    async with open_agent() as agent:
        await agent.sessions.open(SessionConfig(folder=str(tmp_path)), None)
        tasks = [{"executable": "/bin/true", "cwd": cwd} for cwd in ("there", "runs")]
        planned = await agent.call("submit_tasks", **ONE, tasks=tasks, dry_run=True)
        assert planned["problems"] == [f"task.000002: cwd {tmp_path}/runs is no folder here"]


async def test_a_script_says_what_it_left_out_and_where_to_look_for_secrets(tmp_path: Path) -> None:
    async with open_agent() as agent:
        await agent.session()
        tasks = [
            SQRT | {"name": "plain", "env": {"API_TOKEN": "hidden", "A": "b"}},
            {"name": "open", "executable": "curl", "arguments": ["--password", "hunter2"]},
        ]
        await agent.call("submit_tasks", **ONE, tasks=tasks)
        await agent.call("wait_tasks", **ONE)
        report = await agent.call("export_session", **ONE, folder=str(tmp_path))
        script = await anyio.Path(report["script"]).read_text(encoding="utf-8")
        assert "- Left out, by their names: secrets; set in the environment: API_TOKEN.\n" in script
        assert (
            "- Sources, arguments, prompts and other values stand as they were given, and may hold secrets.\n" in script
        )
        assert "- Look before you pass it on, some look like secrets: open.\n" in script


async def test_what_was_lost_ended_when_the_service_was_last_known_to_live(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open()
    rows = [
        TaskRow("s", f"task.00000{number}", number, None, b"", TaskState.QUEUED, 10.0, None, 0, 0, "", None, None, "")
        for number in (1, 2)
    ]
    done = Outcome(state=TaskState.DONE, started=11.0, ended=50.0)
    ledger.write(PutSession(SessionRow("s", 1.0, 10.0, b"", "", "", False)), PutTasks(tuple(rows)))
    ledger.write(TaskStarted("s", "task.000001", 12.0, 1), TaskStarted("s", "task.000002", 11.0, 1))
    ledger.write(TaskEnded("s", "task.000002", 0, done))
    await ledger.reconcile(100_000.0)
    lost, _ = await ledger.tasks("s")
    await ledger.close()
    assert lost.outcome is not None and (lost.outcome.started, lost.outcome.ended) == (12.0, 50.0)
