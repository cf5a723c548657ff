"""Over a limit, or against the policy: a refusal that names the setting, and nothing is taken."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.runtime.export.script import write_script
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

ONE = {"function": "math:sqrt", "args": [4]}
SOURCE = {"source": "def one():\n    return 1"}


@asynccontextmanager
async def agent_with(backend: ScriptedBackend | None = None, **settings: Any) -> AsyncIterator[Agent]:
    async with open_agent(backend=backend, settings=Settings(**settings)) as agent:
        await agent.session()
        yield agent


async def submit(agent: Agent, *tasks: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return await agent.call("submit_tasks", session="session-1", tasks=list(tasks), **arguments)


async def listed(agent: Agent) -> list[tuple[str, str]]:
    return [(row["task"], row["state"]) for row in (await agent.call("list_tasks", session="session-1"))["tasks"]]


async def refused(agent: Agent, *tasks: dict[str, Any], **arguments: Any) -> str:
    """The same text with and without dry_run; nothing was taken."""
    before = await listed(agent)
    texts = {
        await agent.refusal("submit_tasks", session="session-1", tasks=list(tasks), dry_run=dry_run, **arguments)
        for dry_run in (False, True)
    }
    assert await listed(agent) == before
    (text,) = texts
    return text


def with_gate() -> ScriptedBackend:
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    return backend


@pytest.mark.parametrize(
    ("settings", "taken", "tasks", "told"),
    [
        (
            {"max_session_tasks": 3},
            [ONE, ONE],
            [ONE, ONE],
            "this session would have 4 tasks, of which there are 2; the most is 3 (max_session_tasks in the settings",
        ),
        (
            {"max_session_tasks": 3},
            [ONE],
            [{"function": "math:sqrt", "args": [{"item": True}], "for_each": [1, 2, 3]}],
            "would have 4 tasks, of which there are 1",
        ),
        (
            {"max_open_tasks": 3},
            [ONE, ONE],
            [ONE, ONE],
            "all sessions together would have 4 tasks that have not ended, of which there are 2; the most is 3",
        ),
        (
            {"max_session_prompts": 3},
            [{"prompt": ["a", "b"]}],
            [{"prompt": ["c", "d"]}],
            "would have 4 prompts, of which there are 2; the most is 3 (max_session_prompts",
        ),
        (
            {"max_session_tokens": 100},
            [{"prompt": "a", "max_tokens": 60}],
            [{"prompt": "b", "max_tokens": 60}],
            "would have 120 tokens of answers, of which there are 60; the most is 100 (max_session_tokens",
        ),
        (
            {"max_held_bytes": 1_048_576},
            [{"function": "builtins:len", "args": ["x" * 300_000]}],
            [{"function": "builtins:len", "args": ["x" * 300_000]}],
            "bytes in memory, of which there are 602,",
        ),
    ],
)
async def test_more_than_a_limit_is_refused_whole_and_names_it(
    settings: dict[str, Any], taken: list[dict[str, Any]], tasks: list[dict[str, Any]], told: str
) -> None:
    async with agent_with(with_gate(), **settings) as agent:
        await submit(agent, *taken)
        text = await refused(agent, *tasks)
        assert text.startswith("limit_exceeded: ") and told in text


async def test_what_has_ended_makes_room_for_other_tasks_in_all_sessions() -> None:
    backend = with_gate()
    async with agent_with(backend, max_open_tasks=2) as agent:
        await submit(agent, ONE, ONE)
        await agent.session()
        other = {"session": "session-2", "tasks": [ONE]}
        assert "max_open_tasks" in await agent.refusal("submit_tasks", **other)
        backend.may_finish.set()
        await agent.call("wait_tasks", session="session-1")
        await agent.call("submit_tasks", **other)


async def test_a_call_that_is_repeated_with_its_key_is_answered_though_the_limit_is_reached() -> None:
    async with agent_with(max_session_tasks=1) as agent:
        first = await submit(agent, ONE, idempotency_key="once")
        again = await submit(agent, ONE, idempotency_key="once")
        assert again["first"] == first["first"] and again["repeated"]


async def test_a_list_that_only_running_makes_too_long_fails_the_task_that_fans_out() -> None:
    async with agent_with(max_session_tasks=10) as agent:
        many = {"name": "many", "source": "def many():\n    return list(range(50))"}
        each = {"name": "each", "function": "math:sqrt", "args": [{"item": True}], "for_each": {"ref": "many"}}
        await submit(agent, many, each)
        await agent.call("wait_tasks", session="session-1")
        failed = await agent.call("get_result", session="session-1", task="each")
        assert failed["state"] == "FAILED" and "max_session_tasks" in failed["error"]


async def test_results_of_a_for_each_that_are_too_long_together_fail_it_and_stay_readable_one_by_one() -> None:
    async with agent_with(max_result_bytes=2048) as agent:
        text = {"source": "def text(n):\n    return 'x' * 1000", "args": [{"item": True}]}
        await submit(agent, {"name": "each", **text, "for_each": [1, 2, 3]})
        await agent.call("wait_tasks", session="session-1")
        whole = await agent.call("get_result", session="session-1", task="each")
        assert (whole["state"], whole["cause"]) == ("FAILED", "error")
        assert "3,006 bytes together, and one result has 2,048 at most (max_result_bytes" in whole["error"]
        one = await agent.call("get_result", session="session-1", task="each[2]")
        assert one["state"] == "DONE"


async def test_so_many_sessions_are_open_and_no_more() -> None:
    async with agent_with(max_sessions=1) as agent:
        text = await agent.refusal("create_session")
        assert text.startswith("limit_exceeded: as many sessions are open as may be, 1 of 1 (max_sessions")
        await agent.call("close_session", session="session-1", force=True)
        await agent.session()


async def test_nothing_is_submitted_while_the_disk_is_nearly_full(tmp_path: Path) -> None:
    more_than_there_is = shutil.disk_usage(tmp_path).total * 100
    async with agent_with(min_free_bytes=more_than_there_is) as agent:
        for dry_run in (False, True):  # the texts differ in the free bytes, which others change
            text = await agent.refusal("submit_tasks", session="session-1", tasks=[ONE], dry_run=dry_run)
            assert "(min_free_bytes in the settings of this server): nothing is submitted" in text
        assert await listed(agent) == []


@pytest.mark.parametrize(
    ("settings", "task", "told"),
    [
        ({"max_task_s": 60}, {**ONE, "timeout_s": 61}, "timeout_s is 61; the most here is 60 (max_task_s"),
        ({"max_answer_tokens": 10}, {"prompt": "a", "max_tokens": 11}, "max_tokens is 11; the most here is 10"),
        ({"max_session_tokens": 10}, {"prompt": "a"}, "max_tokens must be given here"),
        ({"allow_source": False}, SOURCE, "allow_source is false"),
        ({"allowed_modules": ["numpy.*"]}, ONE, "allowed_modules in the settings of this server is numpy.*"),
        ({"allowed_executables": ["/opt/*"]}, {"executable": "/bin/sh"}, "allowed_executables"),
        ({"allowed_folders": ["/opt"]}, {"executable": "/bin/sh", "cwd": "/opt/../tmp"}, "allowed_folders"),
        (
            {"allowed_folders": ["/opt"]},
            {"executable": "/bin/sh", "process_templates": [{"ranks": 1}, {"ranks": 1, "cwd": "/tmp"}]},
            "cwd '/tmp' is outside",
        ),
    ],
)
async def test_a_task_that_may_not_run_is_refused_with_the_whole_call(
    settings: dict[str, Any], task: dict[str, Any], told: str
) -> None:
    async with agent_with(**settings) as agent:
        text = await refused(agent, {"function": "numpy.linalg:norm"}, {**task, "name": "bad"})
        assert text.startswith("invalid_task: tasks[1] ('bad'): ") and told in text


async def test_a_program_that_an_item_names_is_checked_when_its_task_is_made() -> None:
    async with agent_with(allowed_executables=["/usr/bin/*", "/bin/*"]) as agent:
        names = {"name": "names", "source": "def names():\n    return ['/bin/sh', '/sbin/none']"}
        await submit(agent, names, {"name": "run", "executable": "{item}", "for_each": {"ref": "names"}})
        await agent.call("wait_tasks", session="session-1")
        failed = await agent.call("get_result", session="session-1", task="run")
        assert failed["cause"] == "invalid" and "run[1]" in failed["error"] and "allowed_executables" in failed["error"]


async def test_a_task_without_a_time_of_its_own_gets_the_usual_one() -> None:
    async with agent_with(default_task_s=30, max_task_s=60) as agent:
        await submit(agent, ONE, {**ONE, "timeout_s": 50})
        await agent.call("wait_tasks", session="session-1")
        assert [order.spec.timeout_s for order in agent.backend.received] == [30, 50]


async def test_functions_cannot_be_registered_where_source_is_not_allowed() -> None:
    async with agent_with(allow_source=False) as agent:
        told = await agent.refusal("register_function", session="session-1", source=SOURCE["source"])
        assert "register_function is not allowed here: allow_source is false" in told


async def test_exports_go_only_into_folders_that_may_be_named(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    async with agent_with(allowed_folders=[str(inside)]) as agent:
        await submit(agent, ONE)
        for folder in (tmp_path, f"{inside}/../other", inside / "link"):
            assert "allowed_folders" in await agent.refusal("export_session", session="session-1", folder=str(folder))
        await agent.call("export_session", session="session-1", folder=str(inside))


async def test_the_system_is_described_with_its_limits_policy_and_what_engines_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    async with agent_with(allowed_executables=["/usr/bin/*"]) as agent:
        await agent.call("describe_system")
        assert "allowed_executables: /usr/bin/*" in agent.texts[-1]
        setup = await agent.refusal("create_session", environment={"setup": ["true"]})
        assert "setup in environment is not allowed here, because allowed_executables" in setup
    async with agent_with(max_sessions=7, allowed_folders=["/scratch"]) as agent:
        given = {"variables": {"OMP_NUM_THREADS": 4, "MY_TOKEN": "hidden"}, "setup": ["module() { true; }"]}
        await agent.call("create_session", name="own", environment=given)
        system = await agent.call("describe_system")
        text = agent.texts[-1]
        assert system["settings"]["max_sessions"] == 7 and system["settings"]["allowed_folders"] == ["/scratch"]
        assert "max_sessions 7" in text
        assert "SOME_API_KEY" in system["environment"]["withheld"] and "secret" not in text
        assert "Engines of own start with variables MY_TOKEN, OMP_NUM_THREADS, setup module() { true; }." in text
        assert "hidden" not in text


def test_a_script_repeats_the_environment_and_looks_its_secrets_up() -> None:
    environment = Environment({"A": "1", "MY_TOKEN": "hidden"}, ("module load gcc",))
    plans = plan_backends(SessionConfig(backends=("local",), environment=environment), Settings())
    script = write_script("session-1", [], [plan.open() for plan in plans], plans)
    assert "'setup': ['module load gcc']" in script.text and "'A': '1'" in script.text
    assert "hidden" not in script.text and script.secrets == ("MY_TOKEN",)
