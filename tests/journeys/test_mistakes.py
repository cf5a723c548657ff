"""Mistakes of functions, programs and agents: found from the replies alone, and put right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.journeys.travellers import Traveller, rows_by_name

pytestmark = pytest.mark.anyio

MEAN = """
def mean(values):
    total = 0
    for value in values:
        total += value
    return total / count
"""

FLAKY = """
def flaky(mark):
    import os

    if not os.path.exists(mark):
        os.mkdir(mark)
        os._exit(1)
    return "well"
"""


async def test_a_broken_function_is_found_by_its_line_and_put_right_under_the_same_name(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit({"name": "mean", "source": MEAN, "args": [[1, 2, 6]]})
    (failed,) = (await agent.wait())["failures"]
    assert failed["error"] == "NameError: name 'count' is not defined"
    assert "line 6, in mean: return total / count" in failed["detail"]
    assert f'get_result(session="{agent.session}", task="mean")' in agent.texts[-1]
    assert "line 6, in mean\n    return total / count" in (await agent.result("mean"))["traceback"]
    await agent.submit({"name": "mean", "source": MEAN.replace("count", "len(values)"), "args": [[1, 2, 6]]})
    assert rows_by_name(await agent.wait(tasks=["mean"]))["mean"]["result"] == 3.0
    assert agent.calls == 6 and agent.tokens < 1_800


async def test_tasks_that_crash_fail_alone_and_one_that_is_retried_ends_well(agent: Traveller, tmp_path: Path) -> None:
    await agent.create("local")
    await agent.submit(
        {"name": "exit", "source": "def leave():\n    import os\n\n    os._exit(3)"},
        {"name": "kill", "source": "def die():\n    import os\n\n    os.kill(os.getpid(), 9)"},
        {"name": "flaky", "source": FLAKY, "args": [str(tmp_path / "mark")], "retries": 1, "retry_delay_s": 0},
        {"name": "rest", "function": "builtins:abs", "args": [{"item": True}], "for_each": list(range(20))},
    )
    waited = await agent.wait()
    assert waited["counts"] == {"FAILED": 2, "DONE": 21}
    assert sorted(name for failed in waited["failures"] for name in failed["tasks"]) == ["exit", "kill"]
    assert {failed["cause"] for failed in waited["failures"]} == {"crashed"}
    assert rows_by_name(waited)["flaky"]["result"] == "well"
    assert rows_by_name(waited)["rest"]["result"] == list(range(20))
    assert agent.calls == 3 and agent.tokens < 1_300


async def test_a_launcher_that_does_not_wait_for_its_work_is_told_of_and_put_right(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit({"name": "launch", "executable": "/bin/sh", "arguments": ["-c", "sleep 600 & echo started"]})
    (note,) = (await agent.wait())["notes"]
    assert note == "launch: processes that still ran when it ended were stopped: 1; it must wait for what it starts"
    await agent.submit({"name": "work", "executable": "/bin/sh", "arguments": ["-c", "echo worked & wait"]})
    waited = await agent.wait(tasks=["work"])
    assert rows_by_name(waited)["work"]["result"] == "worked" and "notes" not in waited
    assert agent.calls == 5 and agent.tokens < 900


async def test_the_bad_rank_of_a_job_of_four_is_found_in_one_more_call(agent: Traveller) -> None:
    await agent.create("local")
    source = "def solve():\n    import os\n\n    rank = int(os.environ['RHAPSODY_RANK'])\n    return 6 / (rank - 2)"
    await agent.submit({"name": "job", "source": source, "ranks": 4})
    (failed,) = (await agent.wait())["failures"]
    assert "rank 2" in failed["error"] and "ZeroDivisionError" in failed["error"] and failed["tasks"] == ["job"]
    told = await agent.result("job")
    assert [rank["rank"] for rank in told["ranks"]] == [2, 0, 1, 3]
    assert "ZeroDivisionError" in told["ranks"][0]["error"] and told["ranks"][1]["preview"] == "-3.0"
    assert agent.calls == 4 and agent.tokens < 1_500


TRAIN = "def train():\n    return {'accuracy': 0.9}\n\n\ndef report():\n    pass"
WRONG_NAMES: list[tuple[str, dict[str, Any], str]] = [
    ("wait_task", {}, "wait_task"),
    ("wait_tasks", {"timeout": 1}, "timeout"),
    ("wait_tasks", {"state": "DOEN"}, "DOEN"),
    ("list_tasks", {"session": "my_session"}, "my_session"),
    ("get_result", {"task": "trian"}, "trian"),
    ("get_result", {"task": "train", "path": "/acuracy"}, "acuracy"),
    ("create_session", {"session": None, "backends": ["lokal"]}, "lokal"),
    ("submit_tasks", {"tasks": [{"executible": "/bin/true"}]}, "executible"),
    ("submit_tasks", {"tasks": [{"source": TRAIN, "entry": "trane"}]}, "trane"),
    ("submit_tasks", {"tasks": [{"function": "duoble", "args": [1]}]}, "duoble"),
    ("submit_tasks", {"tasks": [{"function": "builtins:len", "args": [{"ref": "trayn"}]}]}, "trayn"),
    ("submit_tasks", {"tasks": [{"function": "math:exp", "args": [{"ref": "train", "path": "/accurcy"}]}]}, "accurcy"),
    ("submit_tasks", {"tasks": [{"function": "math:exp", "args": [1], "after": ["tain"]}]}, "tain"),
    ("submit_tasks", {"tasks": [{"function": "math:exp", "args": [1], "backend": "loca"}]}, "loca"),
]


async def test_every_wrong_name_is_answered_with_the_right_one(agent: Traveller) -> None:
    await agent.create("local", name="my-session")
    await agent.call("register_function", session=agent.session, source="def double(x):\n    return 2 * x")
    await agent.submit({"name": "train", "source": TRAIN, "entry": "train"})
    await agent.wait()
    for tool, fields, wrong in WRONG_NAMES:
        arguments = {name: value for name, value in ({"session": agent.session} | fields).items() if value is not None}
        right = meant(await agent.refusal(tool, **arguments))
        corrected = json.loads(json.dumps(arguments).replace(wrong, right))
        await agent.call(tool.replace(wrong, right), **corrected)
    await agent.submit({"name": "root", "function": "math:sqr", "args": [9]})
    (failed,) = (await agent.wait())["failures"]
    await agent.submit({"name": "root", "function": f"math:{meant(failed['error'])}", "args": [9]})
    assert rows_by_name(await agent.wait(tasks=["root"]))["root"]["result"] == 3.0
    assert agent.calls == 8 + 2 * len(WRONG_NAMES) and agent.tokens < 250 * agent.calls


def meant(told: str) -> str:
    """The one name that a refusal offers in the place of a wrong one."""
    (name,) = re.findall(r"did you mean '([^']+)'", told)
    return str(name)
