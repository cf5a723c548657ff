"""The graph of a session with many tasks."""

from __future__ import annotations

import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, Session
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


async def test_a_for_each_is_a_group_of_as_many_tasks_as_it_has() -> None:
    async with Session([ScriptedBackend(lambda *_: [1, 2, 3])]) as session:
        tasks = [ComputeTask(abs, args=(1,), name=f"prepare-{number}") for number in range(50)]
        sweep = ForEach(tasks[0], lambda item, _: ComputeTask(abs, args=(item,)), name="sweep")
        view = SessionView(session, "s")
        await session.submit_tasks([*tasks, sweep])
        view.catch_up_now()
        assert {node["name"]: node["total"] for node in view.head()["graph"]["nodes"]} == {"prepare": 50, "sweep": 1}
        await session.wait_tasks(sweep)
        view.catch_up_now()
        graph = view.head()["graph"]
    assert {node["name"]: node["total"] for node in graph["nodes"]} == {"prepare": 50, "sweep": 3}
    assert graph["nodes"][1]["counts"] == {"DONE": 3} and ["prepare", "sweep", 1] in graph["edges"]
