"""One task for each item of a list, as agents ask for it."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

SQUARE = "def square(x):\n    return x * x"
PICKY = "def picky(x):\n    if x % 3 == 0:\n        raise ValueError(f'{x} is bad')\n    return x"


async def run(agent: Agent, *tasks: dict[str, Any]) -> str:
    session = await agent.session()
    await agent.call("submit_tasks", session=session, tasks=list(tasks))
    await agent.call("wait_tasks", session=session)
    return session


async def result(agent: Agent, session: str, task: str) -> Any:
    return (await agent.call("get_result", session=session, task=task))["result"]


async def test_a_list_gives_the_list_of_results_in_order() -> None:
    async with open_agent() as agent:
        session = await run(agent, {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": [3, 1, 2]})
        assert await result(agent, session, "all") == [9, 1, 4]


async def test_the_items_can_be_the_result_of_another_task_or_a_part_of_it() -> None:
    async with open_agent() as agent:
        session = await run(
            agent,
            {"name": "made", "source": "def made():\n    return {'x': [1, 2, 3]}"},
            {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": {"ref": "made", "path": "/x"}},
            {"name": "sum", "function": "builtins:sum", "args": [{"ref": "all"}]},
        )
        assert await result(agent, session, "sum") == 14


async def test_an_item_stands_in_texts_and_a_part_of_it_as_a_value() -> None:
    async with open_agent() as agent:
        items = [{"city": "Bonn", "n": 1}, {"city": "Oslo", "n": 2}]
        session = await run(
            agent,
            {"name": "echo", "executable": "echo", "arguments": ["n={item}", "{{item}}"], "for_each": [1, "two"]},
            {"name": "ask", "prompt": {"item": True, "path": "/city"}, "for_each": items},
            {"name": "get", "function": "builtins:abs", "args": [{"item": True, "path": "/n"}], "for_each": items},
        )
        assert await result(agent, session, "echo") == ["echo n=1 {item}", "echo n=two {item}"]
        assert await result(agent, session, "ask") == ["answer to Bonn", "answer to Oslo"]
        assert await result(agent, session, "get") == [1, 2]


async def test_an_item_can_be_all_arguments_by_name_or_part_of_a_text_or_the_program() -> None:
    async with open_agent() as agent:
        items = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
        add = "def add(a, b):\n    return a + b"
        session = await run(
            agent,
            {"name": "sums", "source": add, "kwargs": {"item": True}, "for_each": items},
            {"name": "texts", "executable": "echo", "arguments": ["{item/a} of {{item/a}}"], "for_each": items},
            {"name": "both", "executable": "{item}", "for_each": ["true", "date"]},
        )
        assert await result(agent, session, "sums") == [3, 7]
        assert await result(agent, session, "texts") == ["echo 1 of {item/a}", "echo 3 of {item/a}"]
        assert await result(agent, session, "both") == ["true", "date"]


async def test_the_result_of_a_task_can_be_all_arguments_by_name() -> None:
    async with open_agent() as agent:
        session = await run(
            agent,
            {"name": "best", "source": "def best():\n    return {'x': 2, 'y': 5}"},
            {"name": "use", "source": "def use(x, y):\n    return x * y", "kwargs": {"ref": "best"}},
        )
        assert await result(agent, session, "use") == 10


async def test_an_item_that_looks_like_a_reference_is_data() -> None:
    async with open_agent() as agent:
        task = {
            "name": "all",
            "source": "def keys(x):\n    return list(x)",
            "args": [{"item": True}],
            "for_each": [{"literal": {"ref": "nobody"}}],
        }
        session = await run(agent, task)
        assert await result(agent, session, "all") == [["ref"]]


async def test_the_tasks_can_use_the_result_of_another_task_too() -> None:
    async with open_agent() as agent:
        session = await run(
            agent,
            {"name": "base", "function": "builtins:abs", "args": [-10]},
            {"name": "all", "function": "builtins:pow", "args": [{"ref": "base"}, {"item": True}], "for_each": [1, 2]},
        )
        assert await result(agent, session, "all") == [10, 100]


async def test_where_one_fails_the_others_keep_their_results_and_each_can_be_read() -> None:
    async with open_agent() as agent:
        session = await run(
            agent,
            {"name": "all", "source": PICKY, "args": [{"item": True}], "for_each": [1, 2, 3, 4]},
            {"name": "needs", "function": "builtins:len", "args": [{"ref": "all"}]},
            {"name": "anyway", "function": "builtins:list", "args": [{"ref": "all"}], "on_upstream_failure": "run"},
        )
        whole = await agent.call("get_result", session=session, task="all")
        assert (whole["state"], whole["cause"]) == ("FAILED", "error")
        assert "of 4 tasks 1 FAILED; all[2]: ValueError: 3 is bad" in whole["error"]
        assert await result(agent, session, "all[3]") == 4
        assert (await agent.call("get_result", session=session, task="needs"))["state"] == "CANCELED"
        assert await result(agent, session, "anyway") == [1, 2, None, 4]


async def test_an_empty_list_gives_an_empty_list() -> None:
    async with open_agent() as agent:
        session = await run(agent, {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": []})
        assert await result(agent, session, "all") == []


async def test_what_is_no_list_fails_in_words() -> None:
    async with open_agent() as agent:
        session = await run(
            agent,
            {"name": "one", "function": "builtins:abs", "args": [1]},
            {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": {"ref": "one"}},
        )
        told = await agent.call("get_result", session=session, task="all")
        assert (told["cause"], told["error"]) == (
            "invalid",
            "for_each needs a list, and the result of one is of type int.",
        )


async def test_canceling_it_cancels_its_tasks() -> None:
    async with open_agent() as agent:
        agent.backend.may_finish.clear()
        session = await agent.session()
        task = {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": [1, 2, 3]}
        await agent.call("submit_tasks", session=session, tasks=[task])
        await agent.call("cancel_tasks", session=session, tasks=["all"])
        told = await agent.call("get_result", session=session, task="all")
        assert (told["state"], told["cause"]) == ("CANCELED", "canceled")
        page = await agent.call("list_tasks", session=session, for_each="all")
        assert [row["state"] for row in page["tasks"]] == ["CANCELED"] * 3


async def test_what_waits_for_the_rest_of_its_tasks_is_canceled_with_them_and_said_to_be() -> None:
    async with open_agent() as agent:
        agent.backend.may_finish.clear()
        session = await agent.session()
        tasks = [
            {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": [1, 2, 3]},
            {"name": "after", "source": SQUARE, "args": [{"ref": "all"}]},
        ]
        await agent.call("submit_tasks", session=session, tasks=tasks)
        await agent.call("cancel_tasks", session=session, tasks=["all[1]"])
        assert "1 canceled" in agent.texts[-1] and "Still ending" not in agent.texts[-1]
        assert "Canceled once the rest of what they wait for has ended: after." in agent.texts[-1]
        agent.backend.may_finish.set()
        told = await agent.call("wait_tasks", session=session, tasks=["after"])
        assert told["counts"] == {"CANCELED": 1}


async def test_a_thousand_tasks_are_one_row_and_their_list_has_pages() -> None:
    async with open_agent() as agent:
        task = {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": list(range(1000))}
        session = await run(agent, task)
        assert (await agent.call("list_tasks", session=session))["total"] == 1
        first = await agent.call("list_tasks", session=session, for_each="all", limit=3)
        assert ([row["name"] for row in first["tasks"]], first["total"]) == (["all[0]", "all[1]", "all[2]"], 1000)
        more = await agent.call("list_tasks", session=session, for_each="all", limit=2, cursor=first["next_cursor"])
        assert [row["task"] for row in more["tasks"]] == ["task.000001[3]", "task.000001[4]"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"args": [1]}, "invalid_task: tasks[0]"),
        ({"for_each": {"x": 1}}, "for_each is a list, or a reference to one"),
        ({"for_each": [{"a": 1}], "args": [{"item": True, "path": "/b"}]}, "item 0: path '/b' leads nowhere"),
        ({"for_each": [1, "x"], "kwargs": {"y": "{item}"}}, "item 0: square(x) does not take these arguments"),
        ({"for_each": {"ref": "nobody"}}, "unknown task 'nobody'"),
        ({"args": ["{item.n} {item}"]}, "{item.n} in a text names a part wrongly; write it as in {item/name}"),
        ({"for_each": None, "args": ["a {item}"]}, "invalid_task: tasks[0]"),
        (
            {"kwargs": {"item": True}, "for_each": [5]},
            "kwargs is an object with the function's arguments by name, not 5",
        ),
        ({"process_templates": [{"ranks": 1, "env": {"A": "{item}"}}]}, "process_templates hold no {item}"),
        ({"for_each": None}, "invalid_task: tasks[0]"),
    ],
)
async def test_a_wrong_for_each_is_refused_whole(change: dict[str, Any], told: str) -> None:
    async with open_agent() as agent:
        session = await agent.session()
        task = {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": [1]} | change
        task = {key: value for key, value in task.items() if value is not None}
        assert told in await agent.refusal("submit_tasks", session=session, tasks=[task])
        assert (await agent.call("list_tasks", session=session))["total"] == 0


async def test_a_failure_of_one_task_has_its_cause() -> None:
    def script(spec: TaskSpec, values: list[Any]) -> Any:
        if spec.uid.endswith("[1]"):
            return Outcome(state=TaskState.FAILED, started=1.0, ended=2.0, cause=Cause.TIMEOUT, error="its time was up")
        return perform(spec, values)

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        session = await run(agent, {"name": "all", "source": SQUARE, "args": [{"item": True}], "for_each": [1, 2]})
        assert (await agent.call("get_result", session=session, task="all"))["cause"] == "timeout"
