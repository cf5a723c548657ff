"""A screening with an expensive last step, in one submission, on real workers and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from rhapsody_mcp.backends import LocalExecutionBackend
from tests.agents import open_agent

pytestmark = pytest.mark.anyio

SCORE = """
def score(number, folder):
    import os
    if os.path.exists(f"{folder}/{number}"):
        raise ValueError("by chance")
    return {"number": number, "score": number / 10}
"""
BEST = "def best(runs):\n    return max((run for run in runs if run), key=lambda run: run['score'])"


async def test_a_screening_is_one_submission_and_its_failed_run_is_mended_in_place(tmp_path: Path) -> None:
    mark = tmp_path / "9"
    mark.touch()
    tasks: list[dict[str, Any]] = [
        {
            "name": "runs",
            "source": SCORE,
            "args": [{"item": True}, str(tmp_path)],
            "for_each": [3, 9, 6],
            "retries": 1,
            "retry_delay_s": 0,
        },
        {
            "name": "good",
            "executable": "echo",
            "arguments": ["{item/number}"],
            "for_each": {"ref": "runs"},
            "when": {"item": True, "path": "/score", "above": 0.5},
        },
        {"name": "best", "source": BEST, "args": [{"ref": "runs"}], "priority": 3},
        {
            "name": "costly",
            "executable": "sh",
            "arguments": ["-c", "echo ran"],
            "when": {"ref": "best", "path": "/score", "above": 0.8},
        },
        {"name": "report", "function": "builtins:repr", "args": [{"ref": "costly"}], "on_upstream_failure": "run"},
    ]
    async with open_agent(backend=cast(Any, LocalExecutionBackend(num_workers=2))) as agent:
        session = await agent.session()

        async def result(task: str) -> Any:
            return (await agent.call("get_result", session=session, task=task))["result"]

        await agent.call("submit_tasks", session=session, tasks=tasks)
        reply = await agent.call("wait_tasks", session=session)
        assert reply["counts"] == {"DONE": 3, "FAILED": 1, "CANCELED": 3}
        assert "failed 2 times, its retry is used up" in reply["failures"][0]["error"]
        mark.unlink()
        await agent.call("submit_tasks", session=session, retry=["runs"])
        assert "Note: report ended with what there was before" in agent.texts[-1]
        reply = await agent.call("wait_tasks", session=session, cursor=reply["cursor"])
        assert reply["counts"] == {"DONE": 8, "skipped": 1} and reply["failures"] == []
        assert await result("good") == [None, "9", "6"]
        assert (await result("best"), await result("costly")) == ({"number": 9, "score": 0.9}, "ran")
        assert await result("report") == "None"  # it ran without the result before
        await agent.call("submit_tasks", session=session, retry=["report"])
        await agent.call("wait_tasks", session=session)
        assert await result("report") == "'ran'"
        await agent.refusal("submit_tasks", session=session, retry=["report"])
        statistics = await agent.call("get_statistics", session=session)
        assert statistics["counts"] == {"DONE": 8, "skipped": 1}
