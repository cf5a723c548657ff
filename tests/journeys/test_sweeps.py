"""Sweeps: many tasks in one call, and what they tell in a few more."""

from __future__ import annotations

import pytest

from tests.journeys.travellers import Traveller, rows_by_name

pytestmark = pytest.mark.anyio

RUN = """
def run(rate):
    if rate in (0.02, 0.3, 0.5, 0.9):
        raise ValueError(f"no convergence at {rate}")
    return {"rate": rate, "loss": round((rate - 0.7) ** 2, 6)}
"""
BEST = """
def best(runs):
    return sorted((run for run in runs if run), key=lambda run: run["loss"])[:5]
"""


async def test_a_sweep_of_200_and_its_best_take_three_calls(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit(
        {"name": "runs", "source": RUN, "args": [{"item": True}], "for_each": [1 + n / 200 for n in range(200)]},
        {"name": "best", "source": BEST, "args": [{"ref": "runs"}]},
    )
    waited = await agent.wait()
    assert waited["ended"] and waited["counts"] == {"DONE": 201}
    done = rows_by_name(waited)
    assert done["best"]["result"][0] == {"rate": 1.0, "loss": 0.09}
    assert len(done["runs"]["preview"]) < 500, "what was passed on need not be read"
    assert agent.calls == 3 and agent.tokens < 1_500


async def test_a_sweep_of_500_with_four_bad_items_is_read_in_four_calls_and_under_4000_tokens(agent: Traveller) -> None:
    await agent.create("local")
    rates = [number / 500 for number in range(500)]
    await agent.submit(
        {"name": "runs", "source": RUN, "args": [{"item": True}], "for_each": rates},
        {"name": "best", "source": BEST, "args": [{"ref": "runs"}], "on_upstream_failure": "run"},
    )
    waited = await agent.wait()
    assert waited["counts"] == {"DONE": 497, "FAILED": 4}
    (failed,) = waited["failures"]
    assert failed["count"] == 4 and "no convergence at 0." in failed["error"] and "line 4" in failed["detail"]
    assert rows_by_name(waited)["best"]["result"][0] == {"rate": 0.7, "loss": 0.0}
    around = await agent.result("runs", start=345, limit=20)
    assert [run["rate"] for run in around["result"]] == rates[345:365]
    assert agent.calls == 4 and agent.tokens < 4_000


async def test_a_function_is_registered_once_and_used_by_name_in_fifty_tasks(agent: Traveller) -> None:
    await agent.create("local")
    source = "def power(base, exponent):\n    return base**exponent"
    await agent.call("register_function", session=agent.session, source=source)
    await agent.submit(
        {"name": "powers", "function": "power", "args": [2, {"item": True}], "for_each": list(range(50))},
        {"name": "total", "function": "builtins:sum", "args": [{"ref": "powers"}]},
    )
    waited = await agent.wait()
    assert rows_by_name(waited)["total"]["result"] == 2**50 - 1
    assert agent.calls == 4 and agent.tokens < 2_000


async def test_statistics_tell_the_slowest_group_and_the_critical_path_of_a_sweep(agent: Traveller) -> None:
    await agent.create("local")
    burn = "def burn(start, seconds):\n    import time\n\n    time.sleep(seconds)\n    return start + seconds"
    await agent.submit(
        {"name": "load", "source": burn, "args": [0, 0]},
        {"name": "quick", "source": burn, "args": [{"ref": "load"}, {"item": True}], "for_each": [0] * 100},
        {"name": "slow", "source": burn, "args": [{"ref": "load"}, {"item": True}], "for_each": [1.5] * 4},
        {"name": "report", "function": "builtins:max", "args": [{"ref": "slow"}]},
    )
    assert (await agent.wait())["ended"]
    told = await agent.call("get_statistics", session=agent.session)
    assert next(iter(told["groups"])) == "slow" and told["groups"]["slow"]["tasks"] == 4
    first, middle, last = [step["task"] for step in told["critical_path"]["steps"]]
    assert (first, middle[:5], last) == ("load", "slow[", "report")
    assert agent.calls == 4 and agent.tokens < 3_500
