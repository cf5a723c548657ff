"""What an agent finds after the service ended and started again, on a ledger that is real and a backend that is not."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.engine.task.start_log import log_start
from rhapsody_mcp.ledger.records import PutSession, PutTasks, SessionRow, TaskRow, TaskStarted
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.protocol.task_store import Handle, LedgerHandleStore
from rhapsody_mcp.runtime.requests import stored_request
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import ERAS, Agent, Refused, open_agent, open_ledger, perform

pytestmark = pytest.mark.anyio

ADD = "def add(a, b):\n    return a + b"
SCALE, SCALE_AGAIN = "def scale(x):\n    return 2 * x", "def scale(x):\n    return 3 * x"
Life = Callable[..., AbstractAsyncContextManager[Agent]]


@pytest.fixture(params=ERAS)
def life(request: pytest.FixtureRequest, tmp_path: Path) -> Life:
    """Opens an agent before a service that has the same ledger in each of its lives."""
    return partial(open_agent, request.param, ledger=tmp_path)


def never_ending(*uids: str) -> ScriptedBackend:
    """Tasks with these uids stay RUNNING."""

    def script(spec: TaskSpec, values: list[Any]) -> Any:
        return asyncio.Event().wait() if spec.uid in uids else perform(spec, values)

    return ScriptedBackend(script)


async def submit(agent: Agent, *tasks: dict[str, Any], session: str = "session-1", **options: Any) -> dict[str, Any]:
    return await agent.call("submit_tasks", session=session, tasks=list(tasks), **options)


async def waited(agent: Agent, *, session: str = "session-1", **options: Any) -> dict[str, Any]:
    with anyio.fail_after(600):
        return await agent.call("wait_tasks", session=session, **options)


async def until(agent: Agent, **counts: int) -> None:
    """Until so many tasks are in these states."""
    with anyio.fail_after(600):
        while (await waited(agent, timeout_s=0))["counts"] != counts:
            await waited(agent, count=1, timeout_s=0.1)


def body_of(script: Path) -> str:
    return script.read_text(encoding="utf-8").partition("async def repeat")[2]


async def result(agent: Agent, task: str) -> Any:
    return (await agent.call("get_result", session="session-1", task=task))["result"]


async def test_what_finished_is_as_it_was(life: Life) -> None:
    async with life() as agent:
        await agent.session()
        await submit(agent, {"name": "sum", "source": ADD, "args": [1, 2]}, {"name": "say", "prompt": "hello"})
        before = await waited(agent)
    async with life() as agent:
        assert (await waited(agent))["done"] == before["done"]
        assert await result(agent, "sum") == 3
        assert (await waited(agent, cursor=before["cursor"]))["done"] == []
        rows = (await agent.call("list_tasks", session="session-1"))["tasks"]
        assert [row["name"] for row in rows] == ["sum", "say"]
        assert agent.backend.received == []


async def test_what_ran_is_lost_unless_it_may_be_tried_again(life: Life) -> None:
    tasks: list[dict[str, Any]] = [
        {"name": "lost", "source": ADD, "args": [1, 2]},
        {"name": "again", "source": ADD, "args": [3, 4], "retries": 1},
        {"name": "after-lost", "source": ADD, "args": [{"ref": "lost"}, 1]},
        {"name": "after-again", "source": ADD, "args": [{"ref": "again"}, 1]},
    ]
    async with life(backend=never_ending("task.000001", "task.000002")) as agent:
        await agent.session()
        await submit(agent, *tasks)
        assert (await waited(agent, timeout_s=0))["counts"] == {"RUNNING": 2, "WAITING": 2}
    async with life() as agent:
        ended = await waited(agent)
        assert ended["counts"] == {"FAILED": 1, "DONE": 2, "CANCELED": 1}
        causes = {group["cause"] for group in ended["failures"]}
        assert causes == {"lost", "upstream"}
        assert await result(agent, "after-again") == 8
        refused = await agent.call("get_result", session="session-1", task="lost")
        assert refused["cause"] == "lost" and "service ended" in refused["error"]


async def test_one_that_was_lost_has_run_until_the_service_ended(life: Life) -> None:
    async with life(backend=never_ending("task.000001")) as agent:
        await agent.session()
        await submit(agent, {"name": "sum", "source": ADD, "args": [1, 2]})
        await until(agent, RUNNING=1)
        before = time.time()
    async with life() as agent:
        await waited(agent)
        outcome = agent.sessions.get("session-1").task("sum").outcome
        assert outcome is not None and before <= outcome.ended <= time.time()


async def test_one_that_was_lost_can_be_submitted_again_under_its_name(life: Life) -> None:
    async with life(backend=never_ending("task.000001")) as agent:
        await agent.session()
        await submit(agent, {"name": "sum", "source": ADD, "args": [1, 2]})
    async with life() as agent:
        await submit(agent, {"name": "sum", "source": ADD, "args": [1, 2]})
        assert await result(agent, "sum") == 3 or (await waited(agent))["counts"] == {"DONE": 1}
    async with life() as agent:
        assert (await waited(agent))["counts"] == {"DONE": 1} and await result(agent, "sum") == 3


async def test_a_prompt_keeps_the_results_in_its_text_when_their_names_are_anothers(life: Life) -> None:
    told = {"name": "told", "prompt": "{{ref:sum}} is {ref:sum}", "retries": 1}
    drawn = {
        "name": "drawn",
        "messages": [{"role": "user", "content": "{ref:sum}"}],
        "seed": {"ref": "sum"},
        "retries": 1,
    }
    async with life(backend=never_ending("task.000002", "task.000003")) as agent:
        await agent.session()
        await submit(agent, {"name": "sum", "source": ADD, "args": [1, 2]}, told, drawn)
        await until(agent, DONE=1, RUNNING=2)
    async with life() as agent:
        assert (await waited(agent))["counts"] == {"DONE": 3}
        assert await result(agent, "told") == "answer to {ref:sum} is 3"
        assert await result(agent, "drawn") == "answer to 3"


async def test_a_sweep_goes_on_where_it_was(life: Life) -> None:
    items = [1, 2, 3]
    sweep = {"name": "sweep", "source": SCALE, "args": [{"item": True}], "for_each": items, "retries": 1}
    async with life(backend=never_ending("task.000001[1]")) as agent:
        await agent.session()
        await submit(agent, sweep)
        await until(agent, DONE=2, RUNNING=1)
    async with life() as agent:
        assert (await waited(agent))["counts"] == {"DONE": 3}
        assert [order.spec.uid for order in agent.backend.received] == ["task.000001[1]"]
        assert await result(agent, "sweep") == [2, 4, 6]
        assert await result(agent, "sweep[2]") == 6


async def test_a_sweep_over_a_result_goes_on_where_it_was(life: Life) -> None:
    make = {"name": "items", "source": "def make():\n    return [1, 2, 3]"}
    over = {"ref": "items"}
    sweep = {"name": "sweep", "source": SCALE, "args": [{"item": True}], "for_each": over, "retries": 1}
    total = {"name": "total", "function": "builtins:sum", "args": [{"ref": "sweep"}]}
    async with life(backend=never_ending("task.000002[0]")) as agent:
        await agent.session()
        await submit(agent, make, sweep, total)
        await until(agent, DONE=3, RUNNING=1, WAITING=1)
    async with life() as agent:
        await waited(agent)
        assert {order.spec.uid for order in agent.backend.received} == {"task.000002[0]", "task.000003"}
        assert await result(agent, "total") == 12
    async with life() as agent:
        assert await result(agent, "sweep[1]") == 4 and agent.backend.received == []


async def test_a_repeated_call_submits_nothing_twice(life: Life) -> None:
    async with life() as agent:
        await agent.session()
        first = await submit(agent, {"source": ADD, "args": [1, 2]}, idempotency_key="one")
    async with life() as agent:
        again = await submit(agent, {"source": ADD, "args": [1, 2]}, idempotency_key="one")
        assert (again["first"], again["repeated"]) == (first["first"], True)
        other = {"session": "session-1", "tasks": [{"source": ADD, "args": [1, 3]}], "idempotency_key": "one"}
        assert "belongs to a call with other tasks" in await agent.refusal("submit_tasks", **other)
        assert (await agent.call("list_tasks", session="session-1"))["total"] == 1


async def test_a_call_whose_client_has_left_is_done_whole(life: Life) -> None:
    task = {"source": ADD, "args": [1, 2]}
    async with life() as agent:
        await agent.session()
        with anyio.move_on_after(0):
            await submit(agent, task, idempotency_key="one")
        again = await submit(agent, task, idempotency_key="one")
        assert (again["first"], again["last"]) == ("task.000001", "task.000001")
        assert (await waited(agent))["counts"] == {"DONE": 1}


async def test_registered_functions_stay_and_each_task_keeps_its_own(life: Life) -> None:
    async def check(spec: TaskSpec, values: list[Any]) -> Any:
        if spec.uid == "task.000001":
            await asyncio.Event().wait()
        return [] if spec.uid.startswith("~") else perform(spec, values)

    async with life(backend=ScriptedBackend(check)) as agent:
        await agent.session()
        await agent.call("register_function", session="session-1", source=SCALE)
        await submit(agent, {"name": "old", "function": "scale", "args": [5], "retries": 1})
        await agent.call("register_function", session="session-1", source=SCALE_AGAIN)
    async with life() as agent:
        await submit(agent, {"name": "new", "function": "scale", "args": [5]})
        await waited(agent)
        assert (await result(agent, "old"), await result(agent, "new")) == (10, 15)


async def test_a_closed_session_is_gone_with_its_files_and_its_id_is_free(life: Life, tmp_path: Path) -> None:
    async with life() as agent:
        await agent.call("create_session", name="mine")
        await submit(agent, {"source": ADD, "args": [1, 2]}, session="mine")
        await waited(agent, session="mine")
        await agent.call("close_session", session="mine")
        await agent.call("create_session", name="mine")
    async with life() as agent:
        assert (await agent.call("list_tasks", session="mine"))["total"] == 0
        assert len(list((tmp_path / "sessions").iterdir())) == 1
        await agent.call("close_session", session="mine")
    async with life() as agent:
        assert (await agent.call("list_sessions"))["sessions"] == []
        assert list((tmp_path / "sessions").iterdir()) == []
        assert await agent.session() == "session-1"


async def test_ids_of_sessions_are_not_given_twice(life: Life) -> None:
    async with life() as agent:
        await agent.session()
        await agent.call("close_session", session="session-1")
    async with life() as agent:
        assert await agent.session() == "session-2"


async def test_a_session_is_exported_after_a_restart_as_before_it(life: Life, tmp_path: Path) -> None:
    async def script(agent: Agent, folder: Path) -> str:
        exported = await agent.call("export_session", session="session-1", folder=str(folder))
        return body_of(Path(exported["script"]))

    async with life() as agent:
        await agent.session()
        await submit(agent, {"name": "a", "source": ADD, "args": [1, 2]})
        await submit(agent, {"name": "b", "source": ADD, "args": [{"ref": "a"}, {"literal": 2}]})
        await waited(agent)
        before = await script(agent, tmp_path / "before")
    async with life() as agent:
        assert await script(agent, tmp_path / "after") == before


async def test_a_call_that_was_working_has_failed_and_one_that_was_done_is_still_read(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    times: dict[str, Any] = {"created_at": now, "last_updated_at": now, "ttl_ms": 60_000}
    done = Handle(task_id="done", owner="me", status="completed", result={"content": []}, **times)
    async with open_ledger(tmp_path) as ledger:
        handles = LedgerHandleStore(ledger)
        handles.put(done)
        handles.put(Handle(task_id="working", owner="me", **times))
        handles.put(Handle(task_id="asked", owner=None, status="input_required", input_requests={"a": {}}, **times))
        handles.put(Handle(task_id="old", owner="me", **{**times, "ttl_ms": 0}))
    async with open_ledger(tmp_path) as ledger:
        handles = LedgerHandleStore(ledger)
        await handles.load()
        assert handles.get("done") == done and handles.get("old") is None
        for id, owner in (("working", "me"), ("asked", None)):
            failed = handles.get(id)
            assert failed is not None and (failed.status, failed.owner, failed.input_requests) == (
                "failed",
                owner,
                None,
            )
            assert failed.error and "Call the tool again" in failed.error["message"]


async def test_a_session_that_nobody_uses_is_forgotten_with_its_files(life: Life, tmp_path: Path) -> None:
    async with life() as agent:
        await agent.session()
        await submit(agent, {"source": ADD, "args": [1, 2]})
        await waited(agent)
        await agent.sessions.prune(0)
        assert len(agent.sessions.all()) == 1
        await agent.sessions.prune(time.time() + 1)
        assert agent.sessions.all() == [] and list((tmp_path / "sessions").iterdir()) == []
    async with life() as agent:
        assert (await agent.call("list_sessions"))["sessions"] == []


async def test_a_session_with_tasks_to_do_is_not_forgotten(life: Life) -> None:
    async with life(backend=never_ending("task.000001")) as agent:
        await agent.session()
        await submit(agent, {"source": ADD, "args": [1, 2]})
        await until(agent, RUNNING=1)
        await agent.sessions.prune(time.time() + 1)
        assert (await waited(agent, timeout_s=0))["counts"] == {"RUNNING": 1}


async def test_a_task_that_this_version_cannot_read_keeps_its_result(life: Life, tmp_path: Path) -> None:
    async with life(backend=never_ending("task.000002")) as agent:
        await agent.session()
        await submit(agent, {"source": ADD, "args": [1, 2]}, {"source": ADD, "args": [1, 2], "retries": 1})
        await until(agent, DONE=1, RUNNING=1)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as written, written:
        written.execute('UPDATE tasks SET recipe = \'{"request": {"mood": 1}}\'')
    async with life() as agent:
        assert (await waited(agent))["counts"] == {"DONE": 1, "FAILED": 1}
        assert await result(agent, "task.000001") == 3
        failed = await agent.call("get_result", session="session-1", task="task.000002")
        assert failed["cause"] == "invalid" and "cannot be made again" in failed["error"] and "mood" in failed["error"]


async def test_a_task_that_was_about_to_start_is_queued_again_and_one_that_started_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    row = SessionRow("s", 1.0, 1.0, b"{}", "", str(folder), False)
    uids = ("about-to", "started", "started-before", "again")
    unsent = ("untold", "untouched")
    async with open_ledger(tmp_path) as ledger:
        tasks = tuple(TaskRow("s", uid, n, None, b"", TaskState.WAITING, 1.0, None, 0, 0, "", None, None, "")
                      for n, uid in enumerate((*uids, *unsent)))  # fmt: skip
        attempts = dict(zip(uids, (1, 1, 2, 2), strict=True))
        ledger.write(PutSession(row), PutTasks(tasks), *(TaskStarted("s", uid, 0.0, attempts[uid]) for uid in uids))
        for uid, attempt in (("started", 1), ("started-before", 1), ("again", 1), ("again", 2), ("untold", 1)):
            log_start(str(folder), uid, attempt, "engine/p1")
        await ledger.reconcile(2.0)
        found = {task.uid: (task.state.value, task.attempts) for task in await ledger.tasks("s")}
    assert found == {
        "about-to": ("QUEUED", 0),
        "started": ("FAILED", 1),
        "started-before": ("QUEUED", 1),
        "again": ("FAILED", 2),
        "untold": ("FAILED", 0),
        "untouched": ("WAITING", 0),
    }


async def test_a_session_whose_client_left_while_it_was_opened_is_there_whole_or_not_at_all(life: Life) -> None:
    async with life() as agent:
        with anyio.move_on_after(0):
            await agent.call("create_session", name="mine")
        there = [row["session"] for row in (await agent.call("list_sessions"))["sessions"]]
    async with life() as agent:
        assert [row["session"] for row in (await agent.call("list_sessions"))["sessions"]] == there


# --- what earlier versions wrote

OLD_LEDGER = Path(__file__).with_name("ledger_0_1.sql")
"""Version 0.1 wrote it: `ready` had ended, `gate` ran and may be tried again, and each other task waited for `gate`."""


@pytest.fixture
def old_ledger(tmp_path: Path) -> Path:
    (tmp_path / "sessions").mkdir()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        database.executescript(OLD_LEDGER.read_text(encoding="utf-8").replace("@FOLDER@", str(tmp_path)))
        database.execute("PRAGMA user_version = 1")
    return tmp_path


async def test_the_tasks_that_version_0_1_had_not_ended_run(life: Life, old_ledger: Path) -> None:
    async with life() as agent:
        ended = await waited(agent)
        assert ended["counts"] == {"DONE": 22}, ended
        expected = {
            "sum": 42,
            "scaled": 84,
            "root": 4.0,
            "echo": "echo -n 4 42 sum is 42",
            "groups": "echo [1,2,3]",
            "say": ["answer to 42 and {ref:sum}", "answer to 1"],
            "chat": "answer to answer to 42 and {ref:sum}",
            "several": "answer to hello [1,2,3]",
            "form": "answer to [1,2,3]",
            "sweep": [43, 44, 45],
            "over": [2, 4, 6],
            "numbered": ["answer to number 0", "answer to number 1", "answer to number 2"],
            "literal": {"ref": "no"},
            "total": 132,
        }
        assert {name: await result(agent, name) for name in expected} == expected
        sampling = {order.spec.uid: order.spec.work for order in agent.backend.received}
        assert getattr(sampling["task.000008"], "temperature", None) == 0.5


async def test_a_call_that_version_0_1_answered_is_not_done_twice(life: Life, old_ledger: Path) -> None:
    tasks = json.loads(OLD_LEDGER.with_suffix(".json").read_text(encoding="utf-8"))
    async with life() as agent:
        again = await submit(agent, *tasks, idempotency_key="once")
        assert (again["repeated"], again["first"], again["submitted"]) == (True, "task.000002", len(tasks))
        with pytest.raises(Refused, match="invalid_request"):
            await submit(agent, *tasks[:-1], idempotency_key="once")


def test_the_fields_of_a_stored_request_are_those_of_its_version() -> None:
    """A renamed or removed field needs a version of its own: see `VERSION`."""
    assert (stored_request.VERSION, sorted(TaskRequest.model_fields)) == (1, FIELDS_OF_VERSION_1)


FIELDS_OF_VERSION_1 = [
    *("after", "args", "arguments", "backend", "container", "cores", "cwd", "entry", "env", "executable", "for_each"),
    *("function", "gpus", "json_schema", "kwargs", "logprobs", "max_tokens", "memory_gb", "messages", "model", "mpi"),
    *("n", "name", "on_upstream_failure", "outputs", "packages", "priority", "process", "process_templates", "prompt"),
    *("python", "ranks", "ranks_per_node", "retries", "retry_delay_s", "seed", "setup", "source", "stdout"),
    *("stop_sequences", "system_prompt", "temperature", "timeout_s", "top_k", "top_p", "when"),
]


async def test_a_field_that_has_another_name_now_is_read_from_an_earlier_version(
    life: Life, old_ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if version 1 had had `source` under the name `code`, and a later program had given it its present name."""
    with closing(sqlite3.connect(old_ledger / "ledger.sqlite")) as database:
        database.execute("UPDATE tasks SET recipe = CAST(replace(recipe, '\"source\":', '\"code\":') AS BLOB)")
        database.commit()
    monkeypatch.setattr(stored_request, "VERSION", 2)
    monkeypatch.setitem(
        stored_request.UPGRADES,
        1,
        lambda fields: {"source" if name == "code" else name: value for name, value in fields.items()},
    )
    async with life() as agent:
        assert (await waited(agent))["counts"] == {"DONE": 22}


async def test_a_task_of_a_later_version_fails_and_says_so(life: Life, old_ledger: Path) -> None:
    with closing(sqlite3.connect(old_ledger / "ledger.sqlite")) as database:
        later = b'{"request":{"source":"def f(): ..."},"version":99}'
        database.execute("UPDATE tasks SET recipe = ? WHERE uid = 'task.000003'", [later])
        database.commit()
    async with life() as agent:
        await waited(agent)
        refused = await agent.call("get_result", session="session-1", task="task.000003")
        assert refused["cause"] == "invalid" and "version 99" in refused["error"]
