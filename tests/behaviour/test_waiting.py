"""How an agent waits, reads results, lists, cancels and closes."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp.types import CallToolResult

from rhapsody_mcp.backends.base import Report
from rhapsody_mcp.model.errors import BackendUnavailable
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Completion, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader, Stream, Value
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from rhapsody_mcp.toolsets.replies.base import REPLY_BYTES, size_of
from tests.agents import Agent, open_agent, outcome_of, perform

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}


class Held(ScriptedBackend):
    """Does not start the tasks with this prompt before `released` is set."""

    def __init__(self, prompt: str) -> None:
        super().__init__(perform)
        self.prompt, self.released = prompt, anyio.Event()

    async def _run(self, order: TaskRun, report: Report, read: Reader) -> None:
        if isinstance(order.spec.work, Completion) and order.spec.work.prompts == (self.prompt,):
            await self.released.wait()
        await super()._run(order, report, read)


async def submit(agent: Agent, *tasks: dict[str, Any]) -> dict[str, Any]:
    return await agent.call("submit_tasks", **SESSION, tasks=list(tasks))


async def test_a_wait_is_bounded_by_the_cap_and_says_so() -> None:
    async with open_agent(settings=Settings(wait_cap_s=0.01)) as agent:
        await agent.session()
        agent.backend.may_finish.clear()
        await submit(agent, {"name": "slow", "prompt": "x"})
        reply = await agent.call("wait_tasks", **SESSION, timeout_s=3600)
        assert (reply["ended"], reply["asked_timeout_s"], reply["applied_timeout_s"]) == (False, 3600, 0.01)
        assert reply["counts"] == {"RUNNING": 1}
        assert "(asked 3600 s)" in agent.texts[-1] and 'wait_tasks(session="session-1", cursor="' in agent.texts[-1]


async def test_a_wait_for_one_more_returns_when_that_has_ended(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "held", "prompt": "x"}, {"name": "stopped", "prompt": "y"})
    replies: list[dict[str, Any]] = []

    async def wait() -> None:
        replies.append(await agent.call("wait_tasks", **SESSION, count=1, timeout_s=50))

    with anyio.fail_after(600):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await agent.call("cancel_tasks", **SESSION, tasks=["stopped"])
    assert replies[0]["counts"] == {"RUNNING": 1, "CANCELED": 1} and not replies[0]["ended"]
    assert replies[0]["open"] == ["held RUNNING"]


async def test_a_wait_for_some_of_a_sweep_shows_those_that_ended() -> None:
    async with open_agent(backend=(backend := Held("slow"))) as agent:
        await agent.session()
        await submit(agent, {"name": "sweep", "prompt": {"item": True}, "for_each": ["a", "slow", "b", "slow", "c"]})
        reply = await agent.call("wait_tasks", **SESSION, tasks=["sweep"], count=3, timeout_s=1)
        assert reply["counts"] == {"DONE": 3, "QUEUED": 2}
        assert reply["done"] == [
            {
                **{"task": "task.000001", "name": "sweep", "state": "RUNNING", "counts": {"DONE": 3, "QUEUED": 2}},
                "result": {"0": "answer to a", "2": "answer to b", "4": "answer to c"},
            }
        ]
        backend.released.set()
        rest = await agent.call("wait_tasks", **SESSION, tasks=["sweep"], cursor=reply["cursor"])
        assert rest["ended"] and len(rest["done"]) == 1 and len(rest["done"][0]["result"]) == 5


async def test_a_cursor_shows_what_ended_since_and_can_be_repeated(agent: Agent) -> None:
    await submit(agent, {"name": "one", "prompt": "x"})
    first = await agent.call("wait_tasks", **SESSION)
    await submit(agent, {"name": "two", "prompt": "y"})
    for _ in range(2):
        second = await agent.call("wait_tasks", **SESSION, cursor=first["cursor"])
        assert [row["name"] for row in second["done"]] == ["two"] and second["counts"] == {"DONE": 2}
    assert [row["name"] for row in (await agent.call("wait_tasks", **SESSION))["done"]] == ["one", "two"]
    assert (await agent.call("wait_tasks", **SESSION, cursor=second["cursor"]))["done"] == []


async def test_a_cursor_of_a_wait_for_other_tasks_says_so_and_repeats_nothing(agent: Agent) -> None:
    await submit(agent, {"name": "one", "prompt": "x"}, {"name": "two", "prompt": "y"})
    cursor = (await agent.call("wait_tasks", **SESSION, tasks=["one"]))["cursor"]
    reply = await agent.call("wait_tasks", **SESSION, cursor=cursor)
    assert [row["name"] for row in reply["done"]] == ["two"]
    assert "Note: the cursor belongs to a wait for one: what that one showed is not shown again" in agent.texts[-1]
    await submit(agent, {"name": "three", "prompt": "z", "after": ["two"]})
    added = await agent.call("wait_tasks", **SESSION, tasks=["one", "three"], cursor=cursor)
    assert [row["name"] for row in added["done"]] == ["three"] and added["counts"] == {"DONE": 2}
    unknown = await agent.call("wait_tasks", **SESSION, tasks=["one"], cursor="1.0000")
    assert [row["name"] for row in unknown["done"]] == ["one"] and "everything is shown" in agent.texts[-1]
    by_state = (await agent.call("wait_tasks", **SESSION, state="FAILED"))["cursor"]
    assert len((await agent.call("wait_tasks", **SESSION, cursor=by_state))["done"]) == 3
    assert "is none of this session" in await agent.refusal("wait_tasks", **SESSION, cursor="99.0000")


async def test_a_wait_by_state_with_a_cursor_shows_what_ended_after_a_reply_that_was_lost(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "slow", "prompt": "x"})
    before = await agent.call("wait_tasks", **SESSION, state="open", timeout_s=0)
    agent.backend.may_finish.set()
    await agent.call("wait_tasks", **SESSION, state="open", cursor=before["cursor"])
    again = await agent.call("wait_tasks", **SESSION, state="open", cursor=before["cursor"])
    assert [row["name"] for row in again["done"]] == ["slow"] and again["ended"]
    assert (await agent.call("wait_tasks", **SESSION, state="open"))["counts"] == {}


async def test_what_does_not_fit_comes_with_the_next_cursor_and_the_last_to_end_is_shown_at_once(agent: Agent) -> None:
    await submit(agent, *({"name": f"run-{number}", "prompt": f"{number}"} for number in range(50)))
    seen: set[str] = set()
    cursor: dict[str, str] = {}
    calls = 0
    while calls < 5:
        calls += 1
        reply = await agent.call("wait_tasks", **SESSION, **cursor)
        assert len(reply["done"]) <= 20 and reply["done"][-1]["name"] == "run-49"
        seen |= {row["name"] for row in reply["done"]}
        cursor = {"cursor": reply["cursor"]}
        if "done_not_shown" not in reply:
            break
    assert calls == 3 and len(seen) == 50


async def test_failures_are_grouped_by_what_went_wrong_with_one_example_each(agent: Agent) -> None:
    bad = "def bad(x):\n    raise ValueError(f'item {x} is bad')"
    await submit(
        agent,
        {"name": "sweep", "source": bad, "args": [{"item": True}], "for_each": list(range(500))},
        {"name": "alone", "source": bad, "args": [7.5]},
        {"name": "missing", "source": "def missing():\n    raise KeyError('x')"},
        *({"source": bad, "args": [{"ref": "missing"}]} for _ in range(9)),
        {"name": "good", "prompt": "x"},
    )
    reply = await agent.call("wait_tasks", **SESSION)
    assert reply["counts"] == {"DONE": 1, "FAILED": 502, "CANCELED": 9}
    assert [row["name"] for row in reply["done"]] == ["good"]
    assert [(group["cause"], group["count"]) for group in reply["failures"]] == [
        *(("error", 501), ("error", 1), ("upstream", 9))
    ]
    assert reply["failures"][0]["error"] == "ValueError: item 0 is bad"
    assert reply["failures"][0]["tasks"] == ["sweep[0]", "sweep[1]", "sweep[2]"]
    assert "missing did not end DONE" in reply["failures"][2]["error"]
    assert 'get_result(session="session-1", task="sweep[0]")' in agent.texts[-1]
    assert len(agent.texts[-1]) < 1200


async def test_failures_that_are_not_shown_are_counted(agent: Agent) -> None:
    bad = "def bad(x):\n    raise ValueError(x)"
    await submit(agent, *({"source": bad, "args": [name]} for name in "abcdefg"))
    reply = await agent.call("wait_tasks", **SESSION)
    assert len(reply["failures"]) == 5 and reply["failures_not_shown"] == 2
    assert '\n... and 2 more: list_tasks(session="session-1", state="FAILED")\n' in agent.texts[-1]


async def test_failures_that_are_not_shown_are_listed_by_the_states_that_they_have(agent: Agent) -> None:
    bad = "def bad(x):\n    raise ValueError(x)"
    failing = [{"name": name, "source": bad, "args": [name]} for name in "abcde"]
    await submit(agent, *failing, *({"source": bad, "args": [{"ref": name}]} for name in "abcde"))
    await agent.call("wait_tasks", **SESSION)
    listed, others = (f'list_tasks(session="session-1", state="{state}")' for state in ("FAILED", "CANCELED"))
    assert f"more: {listed} and {others}\n" in agent.texts[-1]


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        (
            {"cause": Cause.ERROR, "traceback": 'Traceback:\n  File "a.py", line 3, in fit\n    return 1 / x\n'},
            "a.py, line 3, in fit: return 1 / x",
        ),
        ({"cause": Cause.EXIT_CODE, "stderr": Stream("one\nno such file\n")}, "stderr: no such file"),
        (
            {"cause": Cause.CRASHED, "ranks": (RankOutcome(0, exit_code=9, stderr=Stream("out of memory")),)},
            "stderr: out of memory",
        ),
    ],
)
async def test_the_example_of_a_failure_says_where_it_happened(fields: dict[str, Any], detail: str) -> None:
    async with open_agent(backend=outcome_of(state=TaskState.FAILED, error="it failed", **fields)) as agent:
        await agent.session()
        await submit(agent, {"name": "run", "prompt": "x"})
        reply = await agent.call("wait_tasks", **SESSION)
    assert reply["failures"][0]["detail"] == detail and f"[{detail}]" in agent.texts[-1]


async def test_a_sweep_with_failures_keeps_its_results_and_is_no_failure_of_its_own(agent: Agent) -> None:
    picky = "def picky(x):\n    return 1 / x"
    await submit(agent, {"name": "sweep", "source": picky, "args": [{"item": True}], "for_each": [1, 0, 2]})
    reply = await agent.call("wait_tasks", **SESSION)
    assert [group["tasks"] for group in reply["failures"]] == [["sweep[1]"]]
    row = reply["done"][0]
    assert (row["state"], row["counts"], row["result"]) == ("FAILED", {"DONE": 2, "FAILED": 1}, [1.0, None, 0.5])


async def test_notes_that_are_alike_are_told_once() -> None:
    value = Value("json", "str", 3, b'"x"')
    noted = outcome_of(value=value, notes=("1 of 3 answers were cut off at max_tokens",))
    async with open_agent(backend=noted) as agent:
        await agent.session()
        await submit(agent, {"name": "ask", "prompt": {"item": True}, "for_each": ["a", "b"]})
        reply = await agent.call("wait_tasks", **SESSION)
    assert reply["notes"] == ["2 tasks, such as ask[0]: 1 of 3 answers were cut off at max_tokens"]


async def test_what_is_open_says_what_it_waits_for(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "texts", "prompt": "x"}, {"name": "next", "prompt": {"ref": "texts"}})
    with anyio.fail_after(600):
        while (reply := await agent.call("wait_tasks", **SESSION, timeout_s=0))["counts"].get("RUNNING") != 1:
            pass
    assert reply["open"] == ["texts RUNNING", "next WAITING for texts"]
    assert "Open: texts RUNNING; next WAITING for texts." in agent.texts[-1]


async def test_a_sweep_of_500_with_its_results_takes_four_calls_and_few_tokens() -> None:
    async with open_agent() as agent:
        sizes = []
        calls: list[tuple[str, dict[str, Any]]] = [
            ("create_session", {}),
            ("submit_tasks", {**SESSION, "tasks": [SWEEP, {"name": "best", **BEST}]}),
            ("wait_tasks", SESSION),
            ("close_session", SESSION),
        ]
        for tool, arguments in calls:
            result = await agent.client.call_tool(tool, arguments)
            assert not result.is_error, result.content
            sizes.append(size_of(result))
            if tool == "wait_tasks":
                waited = result.structured_content or {}
    rows = {row["name"]: row for row in waited["done"]}
    assert waited["counts"] == {"DONE": 501} and rows["best"]["result"] == 499 * 499
    assert rows["sweep"]["preview"].startswith("[0,1,4,9,")
    assert sum(sizes) < 6_000  # bytes, of text and data together; about half as many tokens


SWEEP = {
    "name": "sweep",
    "source": "def square(x):\n    return x * x",
    "args": [{"item": True}],
    "for_each": list(range(500)),
}
BEST = {"function": "builtins:max", "args": [{"ref": "sweep"}]}


@given(
    count=st.integers(1, 40),
    result=st.one_of(st.text(max_size=3000), st.lists(st.text(max_size=50), max_size=200), st.binary(max_size=50)),
    error=st.text(max_size=5000),
    failing=st.integers(0, 40),
)
@settings(max_examples=25)
def test_no_reply_is_too_long_whatever_tasks_say(count: int, result: Any, error: str, failing: int) -> None:
    def script(spec: TaskSpec, values: list[Any]) -> Any:
        if int(spec.uid[-3:]) <= failing:
            raise ValueError(f"{spec.uid[-1]}{error}")
        return repr(result) if isinstance(result, bytes) else result

    async def wait() -> CallToolResult:
        async with open_agent(backend=ScriptedBackend(script)) as agent:
            await agent.session()
            await submit(agent, *({"name": f"run-{number}", "prompt": "x"} for number in range(count)))
            return await agent.client.call_tool("wait_tasks", {**SESSION})

    assert size_of(anyio.run(wait)) <= REPLY_BYTES


async def test_a_wait_reports_progress_with_the_state_of_the_engines(agent: Agent) -> None:
    agent.backend.progress = "loading the model"
    agent.backend.may_finish.clear()
    await submit(agent, {"prompt": "x"})
    told: list[tuple[float, float | None, str | None]] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))
        agent.backend.may_finish.set()

    with anyio.fail_after(600):
        result = await agent.client.call_tool("wait_tasks", {**SESSION}, progress_callback=on_progress)
    assert result.structured_content and result.structured_content["ended"]
    assert told[0][1:] == (25.0, "0 of 1 ended; scripted: loading the model")


async def test_a_canceled_wait_harms_nothing(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "slow", "prompt": "x"})
    with anyio.move_on_after(0.01) as given_up:
        await agent.client.call_tool("wait_tasks", {**SESSION})
    assert given_up.cancelled_caught
    agent.backend.may_finish.set()
    assert (await agent.call("wait_tasks", **SESSION))["done"][0]["result"] == "answer to x"


async def test_a_wait_with_failures_and_open_tasks_says_how_to_go_on_with_both(agent: Agent) -> None:
    await submit(agent, {"name": "bad", "source": "def bad():\n    return 1 / 0"})
    await agent.call("wait_tasks", **SESSION)
    agent.backend.may_finish.clear()
    await submit(agent, {"prompt": "x"})
    await agent.call("wait_tasks", **SESSION, timeout_s=0)
    assert "Next: wait_tasks(" in agent.texts[-1]
    assert 'Next: get_result(session="session-1", task="bad")' in agent.texts[-1]


async def test_a_long_error_keeps_its_beginning_and_its_end_in_whole_words(agent: Agent) -> None:
    source = "def bad():\n    raise ValueError('begin ' + 'filling ' * 500 + 'install it with pip')"
    await submit(agent, {"name": "bad", "source": source})
    error = (await agent.call("wait_tasks", **SESSION))["failures"][0]["error"]
    assert error.startswith("ValueError: begin filling") and error.endswith("filling install it with pip")
    assert " filling ... filling " in error and len(error) <= 610


async def test_wrong_arguments_are_told_in_plain_words(agent: Agent) -> None:
    await submit(agent, {"name": "one", "prompt": "x"})
    await agent.call("wait_tasks", **SESSION)
    assert "cursor 'zzz' is no next_cursor" in await agent.refusal("list_tasks", **SESSION, cursor="zzz")
    assert "is no job of many ranks" in await agent.refusal("get_result", **SESSION, task="one", rank=0)
    text = await agent.refusal("cancel_tasks", **SESSION, tasks=["one"], all_open=True)
    assert "contradict each other" in text


async def test_a_prompt_without_a_backend_for_it_is_refused_with_what_to_open() -> None:
    backend = ScriptedBackend(perform)
    backend.kinds = frozenset({"function"})
    async with open_agent(backend=backend) as agent:
        await agent.session()
        text = await agent.refusal("submit_tasks", **SESSION, tasks=[{"name": "ask", "prompt": "x"}])
    assert "tasks[0] ('ask'): no backend" in text and "create_session with vllm or endpoint in backends" in text


async def test_an_engine_that_does_not_start_is_told_with_its_own_words() -> None:
    backend = ScriptedBackend(perform, start_error=BackendUnavailable("the port is taken; take another."))
    async with open_agent(backend=backend) as agent:
        await agent.session()
        await submit(agent, {"prompt": "x"})
        failure = (await agent.call("wait_tasks", **SESSION))["failures"][0]
    assert failure["cause"] == "lost" and "the port is taken; take another." in failure["error"]


async def test_waiting_for_nothing_says_what_to_do(agent: Agent) -> None:
    assert (await agent.call("wait_tasks", **SESSION))["ended"]
    assert "There is no task to wait for" in agent.texts[-1] and "submit_tasks" in agent.texts[-1]
    text = await agent.refusal("wait_tasks", **SESSION, tasks=["trian"])
    assert text.startswith("unknown_task: unknown task 'trian'") and "list_tasks" in text


async def test_tasks_are_listed_in_pages_by_state_and_name(agent: Agent) -> None:
    bad = "def bad(x):\n    return 1 / x"
    await submit(agent, *({"name": f"try-{n}", "source": bad, "args": [n % 2]} for n in range(60)), {"prompt": "x"})
    await agent.call("wait_tasks", **SESSION)
    first = await agent.call("list_tasks", **SESSION, state="FAILED")
    assert (first["total"], len(first["tasks"]), first["has_more"]) == (30, 20, True)
    second = await agent.call("list_tasks", **SESSION, state="FAILED", cursor=first["next_cursor"])
    assert (len(second["tasks"]), second["has_more"]) == (10, False)
    assert {row["name"] for row in first["tasks"] + second["tasks"]} == {f"try-{n}" for n in range(0, 60, 2)}
    assert (await agent.call("list_tasks", **SESSION, name_contains="-5"))["total"] == 11
    assert (await agent.call("list_tasks", **SESSION, state="open"))["total"] == 0
    assert "No task of session-1 matches" in agent.texts[-1]


async def test_a_cancel_ends_open_tasks_and_leaves_ended_ones(agent: Agent) -> None:
    await submit(agent, {"name": "early", "prompt": "x"})
    await agent.call("wait_tasks", **SESSION)
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "late", "prompt": "y"}, {"name": "next", "prompt": [{"ref": "late"}]})
    assert await agent.call("cancel_tasks", **SESSION, tasks=["early", "late"]) == {
        **{"canceled": 2, "had_ended": 1, "still_ending": []}
    }
    page = await agent.call("list_tasks", **SESSION)
    assert [row["state"] for row in page["tasks"]] == ["DONE", "CANCELED", "CANCELED"]
    assert "either tasks=[names], or all_open=true" in await agent.refusal("cancel_tasks", **SESSION)
    await submit(agent, {"prompt": "z"})
    assert (await agent.call("cancel_tasks", **SESSION, all_open=True))["canceled"] == 1


async def test_a_closed_session_is_gone_with_what_it_ran(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"prompt": "x"})
    assert (await agent.call("close_session", **SESSION, force=True))["canceled"] == 1
    assert agent.backend.closed
    text = await agent.refusal("wait_tasks", **SESSION)
    assert text.startswith("unknown_session") and "Valid: none yet" in text


async def test_sessions_are_numbered_or_named_and_a_name_is_taken_once(agent: Agent) -> None:
    assert (await agent.call("create_session", name="sweep"))["session"] == "sweep"
    assert "open already" in await agent.refusal("create_session", name="sweep")
    assert (await agent.call("create_session"))["session"] == "session-2"
    listed = await agent.call("list_sessions")
    assert [row["session"] for row in listed["sessions"]] == ["session-1", "sweep", "session-2"]


async def test_two_agents_share_nothing_but_the_machine() -> None:
    async with open_agent() as one, open_agent() as other:
        await one.session()
        assert (await other.call("list_sessions"))["sessions"] == []


async def test_a_mistake_of_the_server_is_told_as_such_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedBackend):
        def check(self, spec: TaskSpec) -> None:
            raise RuntimeError("a secret of the house")

    async with open_agent(backend=Broken(perform)) as agent:
        await agent.session()
        text = await agent.refusal("submit_tasks", **SESSION, tasks=[{"prompt": "x"}])
    assert text.startswith("internal_error: submit_tasks failed inside the server") and "secret" not in text
    assert "a secret of the house" in caplog.text


async def test_a_task_that_another_of_its_name_replaced_counts_no_more_and_says_so(agent: Agent) -> None:
    fail = "def run(x):\n    raise ValueError('first')"
    again = "def run(x):\n    return x"
    await submit(agent, {"name": "run", "source": fail, "args": [{"item": True}], "for_each": [1, 2]})
    await agent.call("wait_tasks", **SESSION)
    await submit(agent, {"name": "run", "source": again, "args": [{"item": True}], "for_each": [1, 2]})
    reply = await agent.call("wait_tasks", **SESSION)
    assert reply["counts"] == {"DONE": 2} and reply["failures"] == []
    assert (await agent.call("list_sessions"))["sessions"][0]["counts"] == {"DONE": 2}
    first, second = (await agent.call("list_tasks", **SESSION))["tasks"]
    assert first["replaced_by"] == second["task"] == "task.000002" and "replaced_by" not in second
    shown = await agent.call("get_result", **SESSION, task="task.000001[0]")
    assert shown["state"] == "FAILED" and "replaced by task.000002" in agent.texts[-1]
    statistics = await agent.call("get_statistics", **SESSION)
    assert statistics["counts"] == {"DONE": 2} and statistics["replaced"] == 2
    assert "without 2 tasks that others of the same name replaced" in agent.texts[-1]
    assert (await agent.call("wait_tasks", **SESSION, tasks=["task.000001"]))["counts"] == {"FAILED": 2}


class Gathering(ScriptedBackend):
    """Does not put lists together before `released` is set."""

    def __init__(self) -> None:
        super().__init__(perform)
        self.waiting, self.released = anyio.Event(), anyio.Event()

    async def _run(self, order: TaskRun, report: Report, read: Reader) -> None:
        if order.spec.uid.startswith("~"):
            self.waiting.set()
            await self.released.wait()
        await super()._run(order, report, read)


async def test_a_sweep_is_open_until_its_results_are_put_together() -> None:
    value = Value("pickle", "tuple", 3, b"()..", preview="[]")
    ended = Outcome(state=TaskState.DONE, started=1.0, ended=2.0, value=value)
    backend = Gathering()
    backend.script = lambda spec, values: ended
    async with open_agent(backend=backend) as agent:
        await agent.session()
        await submit(agent, {"name": "sweep", "prompt": {"item": True}, "for_each": ["a", "b"]})
        with anyio.fail_after(600):
            await backend.waiting.wait()
        reply = await agent.call("wait_tasks", **SESSION, tasks=["sweep"], state="open", timeout_s=0)
        assert not reply["ended"] and reply["open"] == ["sweep RUNNING"]
        backend.released.set()
        assert (await agent.call("wait_tasks", **SESSION, tasks=["sweep"], state="open"))["ended"]
        await agent.call("wait_tasks", **SESSION, tasks=["sweep"], state="open", timeout_s=0)
        assert agent.texts[-1] == "None of them is open: sweep 2 DONE."


async def test_a_cancel_counts_the_tasks_of_a_sweep_as_the_question_does(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "sweep", "prompt": {"item": True}, "for_each": [str(n) for n in range(29)]})
    assert "cancels 29 tasks" in await agent.refusal("cancel_tasks", **SESSION, tasks=["sweep"])
    assert (await agent.call("cancel_tasks", **SESSION, tasks=["sweep"], force=True))["canceled"] == 29


async def test_a_number_beyond_a_sweep_is_told_what_there_is(agent: Agent) -> None:
    await submit(agent, {"name": "sweep", "prompt": {"item": True}, "for_each": ["a", "b"]})
    refused = await agent.refusal("get_result", **SESSION, task="sweep[200]")
    assert "unknown task 'sweep[200]'. Valid: sweep[0] to sweep[1]." in refused
    used = {"source": "def f(x):\n    return x", "args": [{"ref": "sweep[2]"}]}
    assert "Valid: sweep[0] to sweep[1]." in await agent.refusal("submit_tasks", **SESSION, tasks=[used])


async def test_an_error_that_many_tasks_of_a_list_share_is_told_once(agent: Agent) -> None:
    fail = "def f():\n    raise ValueError('word ' * 30)"
    await submit(agent, *({"source": fail} for _ in range(3)))
    await agent.call("wait_tasks", **SESSION)
    rows = (await agent.call("list_tasks", **SESSION))["tasks"]
    assert len({row["error"] for row in rows}) == 1  # the data is whole by itself
    assert agent.texts[-1].count("the same as above") == 2


class Starting(Held):
    """Is not ready before it may."""

    def __init__(self) -> None:
        super().__init__("held")
        self.progress, self.may_get_ready = "starting", anyio.Event()

    async def start(self) -> None:
        await self.may_get_ready.wait()
        self.progress = "ready"


async def test_what_is_queued_says_why() -> None:
    async with open_agent(backend=(backend := Starting())) as agent:
        await agent.session()
        await submit(
            agent, {"name": "a", "prompt": "held"}, {"name": "sweep", "prompt": {"item": True}, "for_each": ["held"]}
        )
        reply = await agent.call("wait_tasks", **SESSION, timeout_s=0)
        why = "QUEUED until scripted is ready (starting)"
        assert reply["open"] == [f"a {why}", f"sweep {why}"]
        backend.may_get_ready.set()
        while backend.progress != "ready":
            await anyio.lowlevel.checkpoint()
        reply = await agent.call("wait_tasks", **SESSION, timeout_s=0)
        assert reply["open"][0] == "a QUEUED at scripted, which has not started it yet"
        backend.released.set()
