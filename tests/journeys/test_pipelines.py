"""Pipelines: tasks of several kinds whose results feed each other without passing through the agent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio
import pytest

from tests.journeys.travellers import Traveller, rows_by_name

pytestmark = pytest.mark.anyio

FIT = """
def fit(points):
    from fractions import Fraction

    class Line:
        def __init__(self, slope):
            self.slope = slope

        def at(self, x):
            return float(self.slope * x)

    return Line(Fraction(sum(y for _, y in points), sum(x for x, _ in points)))
"""


async def test_the_first_task_of_one_who_knows_nothing_takes_three_calls(agent: Traveller) -> None:
    with anyio.fail_after(600):
        await agent.create()
        assert f'submit_tasks(session="{agent.session}", tasks=[...])' in agent.texts[-1]
        await agent.submit({"source": "def add(a, b):\n    return a + b", "args": [2, 3]})
        assert f'wait_tasks(session="{agent.session}")' in agent.texts[-1]
        waited = await agent.wait()
    assert [row["result"] for row in waited["done"]] == [5] and agent.texts[-1].endswith(": 5")
    assert agent.calls == 3 and agent.tokens < 700


async def test_an_object_goes_from_function_to_function_and_the_agent_never_sees_it(agent: Traveller) -> None:
    await agent.create("local")
    points = [[x, 2 * x] for x in range(1, 11)]
    await agent.submit(
        {"name": "line", "source": FIT, "args": [points]},
        {"name": "told", "source": "def told(line):\n    return line.at(21)", "args": [{"ref": "line"}]},
    )
    done = rows_by_name(await agent.wait())
    assert done["told"]["result"] == 42.0
    assert "result" not in done["line"] and "Line" in done["line"]["preview"]
    assert agent.calls == 3 and agent.tokens < 900


async def test_a_dry_run_tells_what_does_not_fit_before_anything_runs(agent: Traveller, tmp_path: Path) -> None:
    await agent.create("local")
    made = tmp_path / "made"
    touch = {"name": "touch", "executable": "/usr/bin/toch", "arguments": [str(made)]}
    use = {"name": "use", "source": "def use():\n    import nunpy\n    return 1", "after": ["touch"], "cwd": "/nowhere"}
    planned = await agent.submit(touch, use, dry_run=True)
    assert planned["submitted"] == 0 and len(planned["problems"]) == 3
    for told in ("touch: /usr/bin/toch is no program", "use: cwd /nowhere is no folder", "'nunpy'"):
        assert any(told in problem for problem in planned["problems"])
    fixed = {"name": "use", "source": "def use():\n    return 1", "after": ["touch"], "cwd": str(tmp_path)}
    assert not made.exists()
    await agent.submit({**touch, "executable": "/usr/bin/touch"}, fixed)
    assert (await agent.wait())["counts"] == {"DONE": 2} and made.exists()
    assert agent.calls == 4 and agent.tokens < 1_200


async def test_what_cleans_up_runs_although_the_work_failed(agent: Traveller, tmp_path: Path) -> None:
    await agent.create("local")
    lock = tmp_path / "lock"
    await agent.submit(
        {"name": "lock", "executable": "/bin/mkdir", "arguments": [str(lock)]},
        {"name": "work", "executable": "/bin/false", "after": ["lock"]},
        {"name": "report", "function": "platform:node", "after": ["work"]},
        {"name": "free", "executable": "/bin/rmdir", "arguments": [str(lock)], "after": ["work"]}
        | {"on_upstream_failure": "run"},
    )
    waited = await agent.wait()
    assert waited["counts"] == {"DONE": 2, "FAILED": 1, "CANCELED": 1} and not lock.exists()
    assert [failed["tasks"] for failed in waited["failures"]] == [["work"], ["report"]]
    assert agent.calls == 3 and agent.tokens < 1_000


async def test_the_exported_script_gives_a_person_the_same_results_in_a_fresh_process(
    agent: Traveller, tmp_path: Path
) -> None:
    await agent.create("local")
    await agent.submit(
        {
            "name": "squares",
            "source": "def square(x):\n    return x * x",
            "args": [{"item": True}],
            "for_each": [1, 2, 3],
        },
        {"name": "total", "function": "builtins:sum", "args": [{"ref": "squares"}]},
        {"name": "said", "executable": "/bin/echo", "arguments": ["the sum is", {"ref": "total"}]},
    )
    done = rows_by_name(await agent.wait())
    exported = await agent.call("export_session", session=agent.session, folder=str(tmp_path))
    with anyio.fail_after(600):
        ran = await anyio.run_process([sys.executable, exported["script"]])
    again = {name: outcome["result"] for name, outcome in json.loads(ran.stdout).items()}
    assert again == {name: row["result"] for name, row in done.items()} and again["said"] == "the sum is 14"
    assert agent.calls == 4 and agent.tokens < 2_500
