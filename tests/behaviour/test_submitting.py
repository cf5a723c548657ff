"""One call submits once, says what would happen, and lets tasks follow one another."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {"name": "hello", "executable": "/bin/echo", "arguments": ["hello"]}


# --- the same call twice


async def test_a_repeated_call_with_its_key_submits_nothing_twice() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        call = {"session": session, "tasks": [HELLO, {"prompt": "Hi."}], "idempotency_key": "k1"}
        first = await agent.call("submit_tasks", **call)
        await agent.call("wait_tasks", session=session)
        again = await agent.call("submit_tasks", **call)
        assert again == first | {"counts": {"DONE": 2}, "repeated": True}
        assert "nothing was submitted now" in agent.texts[-1]
        assert len(agent.backend.received) == 2


async def test_a_key_with_other_tasks_is_refused_and_names_the_earlier_ones() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[HELLO], idempotency_key="k1")
        refused = await agent.refusal(
            "submit_tasks", session=session, tasks=[HELLO | {"arguments": ["bye"]}], idempotency_key="k1"
        )
        assert refused.startswith(
            "invalid_request: idempotency_key 'k1' belongs to a call with other tasks (task.000001)"
        )


async def test_the_key_of_a_refused_call_is_free() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        await agent.refusal("submit_tasks", session=session, tasks=[{"name": "x"}], idempotency_key="k1")
        reply = await agent.call("submit_tasks", session=session, tasks=[HELLO], idempotency_key="k1")
        assert (reply["submitted"], "repeated" in reply) == (1, False)


async def test_keys_belong_to_their_session() -> None:
    async with open_agent() as agent:
        for session in (await agent.session(), await agent.session()):
            reply = await agent.call("submit_tasks", session=session, tasks=[HELLO], idempotency_key="k1")
            assert "repeated" not in reply


# --- what would happen


async def test_a_dry_run_shows_the_graph_and_submits_nothing() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        tasks = [
            {"name": "texts", "prompt": ["a", "b"]},
            {
                "name": "each",
                "source": "def f(t):\n    return t",
                "args": [{"item": True}],
                "for_each": {"ref": "texts"},
            },
            {"name": "job", "executable": "/bin/hostname", "ranks": 2, "after": ["each"]},
        ]
        reply = await agent.call("submit_tasks", session=session, tasks=tasks, dry_run=True)
        assert reply["submitted"] == 0
        assert reply["graph"] == [
            {"task": "texts", "runs_as": "2 prompts", "level": 1},
            {"task": "each", "runs_as": "a task for each item of texts", "level": 2, "waits_for": ["texts"]},
            {"task": "job", "runs_as": "a job of 2 processes", "level": 3, "waits_for": ["each"]},
        ]
        assert "Dry run, nothing was submitted: 3 tasks in 3 levels" in agent.texts[-1]
        assert (await agent.call("list_tasks", session=session))["total"] == 0
        assert not agent.backend.received
        assert (await agent.call("submit_tasks", session=session, tasks=tasks))["first"] == reply["first"]


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ({"executable": "no-such-program"}, "no-such-program is no program here"),
        (
            {"executable": "/bin/echo", "process_templates": [{"ranks": 1, "policy": {"host_name": "elsewhere"}}]},
            "host 'elsewhere' is no node of this session",
        ),
        ({"executable": "/bin/echo", "cwd": "/no/such"}, "cwd /no/such is no folder here"),
        ({"function": "no_such_module:f"}, "no module 'no_such_module' is installed here"),
        ({"source": "def f():\n    import no_such_module.part"}, "no module 'no_such_module' is installed here"),
        (
            {"executable": "/bin/echo", "process_templates": [{"ranks": 1, "policy": {"gpu_affinity": [99]}}]},
            "GPU 99 was asked for",
        ),
        (
            {"executable": "no-such-program", "arguments": ["{item}"], "for_each": [1, 2]},
            "no-such-program is no program here",
        ),
    ],
)
async def test_a_dry_run_names_what_does_not_fit(task: dict[str, Any], problem: str) -> None:
    async with open_agent() as agent:
        session = await agent.session()
        reply = await agent.call("submit_tasks", session=session, tasks=[task], dry_run=True)
        assert len(reply["problems"]) == 1
        assert problem in reply["problems"][0]
        assert f"Does not fit: task.000001: {problem}" in agent.texts[-1]


async def test_what_a_source_can_do_without_is_no_problem() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        source = "def f():\n    try:\n        import no_such_module\n    except ImportError:\n        pass"
        reply = await agent.call("submit_tasks", session=session, tasks=[{"source": source}], dry_run=True)
        assert reply["problems"] == []
        assert "Everything fits this machine." in agent.texts[-1]


@pytest.mark.parametrize("text", ["{hello}", "say $hello", '{"ref": "hello"}'])
async def test_a_dry_run_names_texts_that_seem_to_refer_to_a_task(text: str) -> None:
    async with open_agent() as agent:
        session = await agent.session()
        tasks = [HELLO, {"name": "echo", "executable": "/bin/echo", "arguments": [text]}]
        reply = await agent.call("submit_tasks", session=session, tasks=tasks, dry_run=True)
        (problem,) = reply["problems"]
        assert problem.startswith("tasks[1] ('echo'): the text ")
        assert problem.endswith("stays as it is; hello's result is {ref:hello}")
        assert "Next: correct what does not fit, or the same call without dry_run." in agent.texts[-1]


async def test_a_submission_notes_such_texts_too() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[HELLO])
        await agent.call("submit_tasks", session=session, tasks=[{"prompt": "Summarise: {hello}"}])
        assert "Note: tasks[0]: the text {hello} stays as it is" in agent.texts[-1]
        assert "hello's result is {ref:hello}" in agent.texts[-1]
        await agent.call("submit_tasks", session=session, tasks=[{"function": "builtins:len", "args": ["{ref:hello}"]}])
        assert (
            """the text {ref:hello} stays as it is; hello's result is the value {"ref": "hello"}""" in agent.texts[-1]
        )
        reply = await agent.call("submit_tasks", session=session, tasks=[{"prompt": "{ref:hello} in {word}s."}])
        assert "Note" not in agent.texts[-1] and "problems" not in reply


async def test_a_replacement_names_what_its_failure_had_canceled() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        bad = {"name": "bad", "function": "builtins:abs", "args": ["x"]}
        needs = {"name": "needs", "function": "builtins:abs", "args": [{"ref": "bad"}]}
        await agent.call("submit_tasks", session=session, tasks=[bad, needs])
        await agent.call("wait_tasks", session=session)
        await agent.call("submit_tasks", session=session, tasks=[bad | {"args": [-3]}])
        assert "needs had ended CANCELED because of what this replaces" in agent.texts[-1]
        await agent.call("submit_tasks", session=session, tasks=[needs])
        assert "because of what this" not in agent.texts[-1]
        await agent.call("wait_tasks", session=session)
        assert (await agent.call("get_result", session=session, task="needs"))["result"] == 3


async def test_the_next_wait_is_for_the_same_tasks() -> None:
    async with open_agent() as agent:
        agent.backend.may_finish.clear()
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[HELLO])
        await agent.call("wait_tasks", session=session, tasks=["hello"], state="open", timeout_s=0)
        assert f'Next: wait_tasks(session="{session}", tasks=["hello"], state="open", cursor=' in agent.texts[-1]


async def test_several_wrong_tasks_are_named_in_one_refusal() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        wrong = [{"name": f"w{number}", "source": "lambda: 1"} for number in range(5)]
        needs = {"name": "needs", "function": "builtins:len", "args": [{"ref": "w0"}]}
        text = await agent.refusal("submit_tasks", session=session, tasks=[*wrong, needs])
        assert all(f"tasks[{number}] ('w{number}'): the source defines no function" in text for number in range(3))
        assert "And 2 more tasks are wrong." in text


async def test_variables_can_be_numbers_and_words_in_an_executable_are_named() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        tasks = [HELLO | {"env": {"OMP_NUM_THREADS": 4}}, {"executable": "echo hello"}]
        reply = await agent.call("submit_tasks", session=session, tasks=tasks, dry_run=True)
        assert "what follows it goes into arguments" in reply["problems"][0]


async def test_a_task_of_a_for_each_whose_items_come_later_is_named_by_its_place() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        numbers = {"name": "numbers", "source": "def numbers():\n    return [1, 2]"}
        each = {"name": "each", "function": "builtins:abs", "args": [{"item": True}], "for_each": {"ref": "numbers"}}
        wrong = {"function": "builtins:abs", "args": [{"ref": "each[1]"}]}
        text = await agent.refusal("submit_tasks", session=session, tasks=[numbers, each, wrong])
        assert 'refer to its result as {"ref": "each", "path": "/1"}' in text
        await agent.call("submit_tasks", session=session, tasks=[numbers, each])
        await agent.call("wait_tasks", session=session)
        await agent.call("submit_tasks", session=session, tasks=[wrong])


async def test_a_dry_run_of_many_tasks_stays_short() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        tasks = [{"name": f"task-{number}", "executable": "no-such-program"} for number in range(1000)]
        reply = await agent.call("submit_tasks", session=session, tasks=tasks, dry_run=True)
        assert (len(reply["graph"]), len(reply["problems"]), reply["names"]) == (30, 30, {})
        assert "... and 970 more." in agent.texts[-1]


async def test_a_dry_run_refuses_what_a_submission_would() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        wrong = {"name": "a", "function": "builtins:len", "args": [{"ref": "b"}]}
        assert "unknown task 'b'" in await agent.refusal("submit_tasks", session=session, tasks=[wrong], dry_run=True)


# --- one after another


async def test_tasks_follow_others_without_their_data() -> None:
    order: list[str] = []

    def script(spec: TaskSpec, values: list[Any]) -> Any:
        order.append(spec.uid)
        return perform(spec, values)

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        session = await agent.session()
        tasks = [HELLO | {"name": "last", "after": ["first", "second"]}, HELLO | {"name": "first"}]
        tasks.append(HELLO | {"name": "second", "after": ["first"]})
        await agent.call("submit_tasks", session=session, tasks=tasks)
        await agent.call("wait_tasks", session=session)
        assert order == ["task.000002", "task.000003", "task.000001"]


async def test_a_circle_of_tasks_that_follow_each_other_is_refused() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        tasks = [HELLO | {"name": "a", "after": ["b"]}, HELLO | {"name": "b", "after": ["a"]}]
        assert "in a circle" in await agent.refusal("submit_tasks", session=session, tasks=tasks)
        assert "unknown task 'c'" in await agent.refusal(
            "submit_tasks", session=session, tasks=[HELLO | {"after": ["c"]}]
        )


async def test_a_failed_task_is_tried_again_and_the_result_says_how_often() -> None:
    tries: list[str] = []

    def script(spec: TaskSpec, values: list[Any]) -> Any:
        tries.append(spec.uid)
        if len(tries) < 3:
            raise RuntimeError("not yet")
        return "now"

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[HELLO | {"retries": 5, "retry_delay_s": 0}])
        await agent.call("wait_tasks", session=session)
        result = await agent.call("get_result", session=session, task="hello")
        assert (result["result"], len(tries)) == ("now", 3)
        assert result["notes"] == ["attempt 3 of 6; attempt 2 ended with cause error: RuntimeError: not yet"]


async def test_a_task_can_run_although_one_that_it_needs_has_failed_before() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        bad = {"name": "bad", "function": "builtins:abs", "args": ["x"]}
        await agent.call("submit_tasks", session=session, tasks=[bad])
        await agent.call("wait_tasks", session=session)
        needs = {"name": "needs", "function": "builtins:repr", "args": [{"ref": "bad", "path": "/a"}]}
        assert "ended FAILED" in await agent.refusal("submit_tasks", session=session, tasks=[needs])
        await agent.call("submit_tasks", session=session, tasks=[needs | {"on_upstream_failure": "run"}])
        await agent.call("wait_tasks", session=session)
        assert (await agent.call("get_result", session=session, task="needs"))["result"] == "None"


async def test_each_task_has_its_own_count_of_attempts_and_says_when_no_retry_is_left(agent: Agent) -> None:
    source = "def f():\n    raise ValueError('boom')"
    counts = {"one": 1, "three": 3}
    tasks = [{"name": n, "source": source, "retries": count, "retry_delay_s": 0} for n, count in counts.items()]
    await agent.call("submit_tasks", session="session-1", tasks=tasks)
    notes = (await agent.call("wait_tasks", session="session-1"))["notes"]
    assert sorted(notes) == [
        "one: attempt 2 of 2, no retry is left; attempt 1 ended with cause error: ValueError: boom",
        "three: attempt 4 of 4, no retry is left; attempt 3 ended with cause error: ValueError: boom",
    ]


async def test_the_tasks_of_a_for_each_over_a_result_that_is_there_are_counted(agent: Agent) -> None:
    numbers = {"name": "numbers", "source": "def f():\n    return list(range(200))"}
    await agent.call("submit_tasks", session="session-1", tasks=[numbers])
    await agent.call("wait_tasks", session="session-1")
    sweep = {"function": "builtins:abs", "args": [{"item": True}], "for_each": {"ref": "numbers"}}
    reply = await agent.call("submit_tasks", session="session-1", tasks=[sweep])
    assert (reply["submitted"], sum(reply["counts"].values()), reply["backends"]) == (1, 200, {"scripted": 200})
    assert "(200 with those of for_each: 200 on scripted; 200 " in agent.texts[-1]


async def test_ranks_over_the_cores_fit_and_say_so() -> None:
    async with open_agent() as agent:
        session = await agent.session()
        tasks = [{"executable": "/bin/echo", "ranks": 10_000}]
        reply = await agent.call("submit_tasks", session=session, tasks=tasks, dry_run=True)
        assert reply["problems"] == [] and "Everything fits this machine." in agent.texts[-1]
        assert "a job of 10000 processes, which share " in agent.texts[-1]


async def test_the_same_thing_several_times_needs_no_item(agent: Agent) -> None:
    tasks = [
        {"name": "poem", "prompt": "Write.", "for_each": 3},
        {"name": "numbered", "prompt": "{item}", "for_each": 2},
    ]
    await agent.call("submit_tasks", session="session-1", tasks=tasks)
    done = (await agent.call("wait_tasks", session="session-1"))["done"]
    assert [row["result"] for row in done] == [["answer to Write."] * 3, ["answer to 0", "answer to 1"]]


async def test_search_looks_into_the_result_too(agent: Agent) -> None:
    source = "def f():\n    return {'rows': ['fine', 'an Error\\nof two lines'], 'n': 7}"
    await agent.call("submit_tasks", session="session-1", tasks=[{"name": "rows", "source": source}])
    await agent.call("wait_tasks", session="session-1")
    found = await agent.call("get_result", session="session-1", task="rows", search="error|7")
    assert found["found_in_result"] == "/rows/1 an Error\n/n 7"
    nothing = await agent.call("get_result", session="session-1", task="rows", search="nothing")
    assert "found_in_result" not in nothing and "found_in_result: no line of its" in agent.texts[-1]


async def test_the_slowest_tasks_come_first_each_of_a_for_each_by_itself() -> None:
    seconds = iter([1.0, 3.0, 2.0])

    def script(spec: TaskSpec, values: list[Any]) -> Outcome:
        now = time.time()
        return Outcome(state=TaskState.DONE, started=now, ended=now + next(seconds))

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        session = await agent.session()
        tasks = [HELLO, {"name": "told", "prompt": "{item}", "for_each": [1, 2]}]
        await agent.call("submit_tasks", session=session, tasks=tasks)
        await agent.call("wait_tasks", session=session)
        page = await agent.call("list_tasks", session=session, slowest=True, limit=2)
        assert [(row["name"], row["seconds"]) for row in page["tasks"]] == [("told[0]", 3.0), ("told[1]", 2.0)]
        assert 'More: list_tasks(session="session-1", limit=2, slowest=true, cursor="2").' in agent.texts[-1]
        page = await agent.call("list_tasks", session=session, slowest=True, limit=2, cursor=page["next_cursor"])
        assert [row["name"] for row in page["tasks"]] == ["hello"]
