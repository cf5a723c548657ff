"""Tasks that run only when a result is as they ask."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

SCORE = {"name": "score", "source": "def score():\n    return {'accuracy': 0.8, 'label': 'good', 'none': None}"}
COSTLY = {"name": "costly", "function": "builtins:str"}
ITEMS = [{"id": 1, "score": 0.2}, {"id": 2, "score": 0.7}, {"id": 3, "score": 0.9}]


def when(**condition: Any) -> dict[str, Any]:
    return {"ref": "score", **condition}


async def run(agent: Agent, *tasks: dict[str, Any]) -> dict[str, Any]:
    """The reply of the wait."""
    session = await agent.session()
    await agent.call("submit_tasks", session=session, tasks=list(tasks))
    return await agent.call("wait_tasks", session=session)


def read(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


async def row(agent: Agent, task: str, session: str = "session-1") -> dict[str, Any]:
    return await agent.call("get_result", session=session, task=task)


@pytest.mark.parametrize(
    ("condition", "runs"),
    [
        ({"path": "/accuracy", "above": 0.5}, True),
        ({"path": "/accuracy", "above": 0.8}, False),
        ({"path": "/accuracy", "below": 0.5}, False),
        ({"path": "/accuracy", "above": 0.5, "below": 0.9}, True),
        ({"path": "/accuracy", "above": 0.85, "below": 0.9}, False),
        ({"path": "/label", "equals": "good"}, True),
        ({"path": "/label", "equals": "bad"}, False),
        ({"path": "/none", "equals": None}, True),
        ({"path": "/label", "exists": True}, True),
        ({"path": "/lable", "exists": True}, False),
        ({"path": "/lable", "exists": False}, True),
        ({"path": "/none", "exists": True}, False),
    ],
)
async def test_a_task_runs_only_when_its_condition_holds(condition: dict[str, Any], runs: bool) -> None:
    async with open_agent() as agent:
        reply = await run(agent, SCORE, COSTLY | {"when": when(**condition)})
        assert reply["counts"] == ({"DONE": 2} if runs else {"DONE": 1, "skipped": 1})
        assert reply["failures"] == []


async def test_a_skipped_task_says_why_and_takes_along_what_needs_it_but_is_no_failure() -> None:
    async with open_agent() as agent:
        report = {"name": "report", "function": "builtins:str", "args": [{"ref": "costly"}]}
        tidy = {"name": "tidy", "function": "builtins:repr", "args": [{"ref": "report"}], "on_upstream_failure": "run"}
        reply = await run(agent, SCORE, COSTLY | {"when": when(path="/accuracy", above=0.9)}, report, tidy)
        assert reply["ended"] and reply["counts"] == {"DONE": 2, "skipped": 2}
        assert reply["failures"] == []
        assert "2 skipped" in agent.texts[-1] and "score/accuracy is 0.8, not above 0.9" in agent.texts[-1]
        assert (await row(agent, "tidy"))["result"] == "None"
        skipped = await row(agent, "report")
        assert (skipped["state"], skipped["cause"]) == ("CANCELED", "skipped")
        assert skipped["error"].startswith("costly was skipped: its condition does not hold: score/accuracy is 0.8")
        counts = (await agent.call("get_statistics", session="session-1"))["counts"]
        assert counts == {"DONE": 2, "skipped": 2}
        listed = await agent.call("list_tasks", session="session-1", state="CANCELED")
        assert [task["cause"] for task in listed["tasks"]] == ["skipped", "skipped"]


async def test_a_path_that_is_not_there_and_a_value_that_is_no_number_are_mistakes() -> None:
    async with open_agent() as agent:
        tasks = [
            COSTLY | {"name": "lost", "when": when(path="/acuracy", above=0.5)},
            COSTLY | {"name": "word", "when": when(path="/label", below=0.5)},
        ]
        reply = await run(agent, SCORE, *tasks)
        assert reply["counts"] == {"DONE": 1, "FAILED": 2}
        lost, word = await row(agent, "lost"), await row(agent, "word")
        assert lost["cause"] == word["cause"] == "invalid"
        assert "'accuracy'" in lost["error"] and "did you mean" in lost["error"]
        assert word["error"] == 'when: score/label is "good", and only a number is below 0.5'


async def test_a_for_each_is_skipped_as_a_whole() -> None:
    async with open_agent() as agent:
        each = {"function": "builtins:abs", "args": [{"item": True}], "when": when(path="/accuracy", above=0.9)}
        numbers = {"name": "numbers", "source": "def numbers():\n    return [1, 2]"}
        after = {"name": "sum", "function": "builtins:sum", "args": [{"ref": "listed"}]}
        reply = await run(
            agent,
            SCORE,
            numbers,
            each | {"name": "listed", "for_each": [1, 2, 3]},
            each | {"name": "read", "for_each": {"ref": "numbers"}},
            after,
        )
        assert reply["counts"] == {"DONE": 2, "skipped": 5} and reply["failures"] == []
        assert (await row(agent, "listed"))["cause"] == (await row(agent, "read"))["cause"] == "skipped"


@pytest.mark.parametrize("source", [ITEMS, {"ref": "made"}])
async def test_items_are_skipped_one_by_one_and_are_null_in_the_list(source: Any) -> None:
    async with open_agent() as agent:
        made = {"name": "made", "source": f"def made():\n    return {ITEMS!r}"}
        each = {
            "name": "fine",
            "function": "builtins:abs",
            "args": [{"item": True, "path": "/id"}],
            "for_each": source,
            "when": {"item": True, "path": "/score", "above": 0.5},
        }
        count = {"name": "count", "function": "builtins:len", "args": [{"ref": "fine"}]}
        reply = await run(agent, made, each, count)
        assert reply["counts"] == {"DONE": 4, "skipped": 1} and reply["failures"] == []
        assert (await row(agent, "fine"))["result"] == [None, 2, 3]
        assert (await row(agent, "count"))["result"] == 3
        assert "the item/score is 0.2, not above 0.5" in (await row(agent, "fine[0]"))["error"]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"ref": "score", "abov": 1}, "did you mean 'above'"),
        ({"ref": "score", "path": "/accuracy"}, "compares with nothing"),
        ({"ref": "score", "above": 1, "equals": 2}, "too much"),
        ({"ref": "score", "above": 2, "below": 1}, "no number is above 2 and below 1"),
        ({"ref": "score", "above": "high"}, 'above is "high"; valid is a number'),
        ({"ref": "score", "exists": 1}, "valid is true or false"),
        ({"above": 1}, '"ref"'),
        ({"ref": "score", "item": True, "above": 1}, '"item"'),
        ({"item": True, "above": 1}, "for_each, which is not given"),
        ({"ref": "scor", "above": 1}, "did you mean 'score'"),
        ({"ref": "score", "path": "accuracy", "above": 1}, "JSON Pointer"),
    ],
)
async def test_a_condition_that_makes_no_sense_is_refused(condition: dict[str, Any], words: str) -> None:
    async with open_agent() as agent:
        session = await agent.session()
        text = await agent.refusal("submit_tasks", session=session, tasks=[SCORE, COSTLY | {"when": condition}])
        assert words in text and "costly" in text


async def test_a_new_task_cannot_need_a_skipped_one_unless_it_runs_without_it() -> None:
    async with open_agent() as agent:
        await run(agent, SCORE, COSTLY | {"when": when(path="/accuracy", above=0.9)})
        next_one = {"name": "next", "function": "builtins:repr", "args": [{"ref": "costly"}]}
        text = await agent.refusal("submit_tasks", session="session-1", tasks=[next_one])
        assert "was skipped" in text
        await agent.call("submit_tasks", session="session-1", tasks=[next_one | {"on_upstream_failure": "run"}])
        await agent.call("wait_tasks", session="session-1")
        assert (await row(agent, "next"))["result"] == "None"


async def test_the_source_of_a_condition_that_failed_counts_as_nothing_there() -> None:
    async with open_agent() as agent:
        bad = {"name": "score", "source": "def bad():\n    raise ValueError('no')"}
        reply = await run(
            agent,
            bad,
            COSTLY | {"when": when(above=1)},
            COSTLY | {"name": "unless", "when": when(exists=False), "on_upstream_failure": "run"},
            COSTLY | {"name": "only", "when": when(above=1), "on_upstream_failure": "run"},
        )
        assert reply["counts"] == {"FAILED": 1, "CANCELED": 1, "DONE": 1, "skipped": 1}


async def test_a_dry_run_shows_conditions() -> None:
    async with open_agent() as agent:
        tasks = [SCORE, COSTLY | {"when": when(path="/accuracy", above=0.9)}]
        await agent.call("submit_tasks", session=await agent.session(), tasks=tasks, dry_run=True)
        assert "only when score/accuracy above 0.9, after score" in agent.texts[-1]


async def test_conditions_outlive_the_service(tmp_path: Path) -> None:
    life = partial(open_agent, ledger=tmp_path)
    waiting = ScriptedBackend(perform)
    waiting.may_start.clear()
    costly = COSTLY | {"when": when(path="/accuracy", above=0.9)}
    each: dict[str, Any] = {"function": "builtins:abs", "args": [{"item": True}], "for_each": [1, 2]}
    each |= {"name": "each", "when": {"item": True, "above": 1}}
    async with life(backend=waiting) as agent:
        await agent.call("submit_tasks", session=await agent.session(), tasks=[SCORE, costly, each])
    async with life() as agent:
        reply = await agent.call("wait_tasks", session="session-1")
        assert reply["counts"] == {"DONE": 2, "skipped": 2}
    async with life() as agent:
        assert (await row(agent, "costly"))["cause"] == "skipped"
        assert (await row(agent, "each"))["result"] == [None, 2]


async def test_an_exported_script_has_the_conditions(tmp_path: Path) -> None:
    async with open_agent() as agent:
        costly = COSTLY | {"when": when(path="/accuracy", above=0.9)}
        each = {"name": "fine", "function": "builtins:abs", "args": [{"item": True, "path": "/id"}], "for_each": ITEMS}
        await run(agent, SCORE, costly, each | {"when": {"item": True, "path": "/score", "above": 0.5, "below": 1}})
        reply = await agent.call("export_session", session="session-1", folder=str(tmp_path))
        script = read(reply["script"])
        compile(script, "script", "exec")

        assert "when=Condition(Part(score_, '/accuracy'), above=0.9)" in script
        assert "when=Condition(item, '/score', above=0.5, below=1)" in script
        assert "Condition" in script.partition("import")[2]
