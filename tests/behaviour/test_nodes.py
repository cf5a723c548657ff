"""How an agent learns on which nodes its tasks ran."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import open_agent

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
NODES = {1: ("node1",), 2: ("node1", "node2"), 5: tuple(f"node{number}" for number in range(1, 6))}


def on_nodes(spec: TaskSpec, values: list[Any]) -> Outcome:
    """A task on as many nodes as it has ranks."""
    return Outcome(state=TaskState.DONE, started=1.0, ended=2.0, nodes=NODES[spec.layout.ranks])


async def test_results_lists_and_statistics_name_the_nodes() -> None:
    async with open_agent(backend=ScriptedBackend(on_nodes)) as agent:
        await agent.session()
        program = {"executable": "/bin/true"}
        tasks = [{"name": f"job{ranks}", "ranks": ranks, **program} for ranks in NODES]
        await agent.call("submit_tasks", **SESSION, tasks=tasks)
        await agent.call("wait_tasks", **SESSION)
        assert (await agent.call("get_result", **SESSION, task="job2"))["nodes"] == "node1, node2"
        assert " s on node1, node2" in agent.texts[-1]
        rows = (await agent.call("list_tasks", **SESSION))["tasks"]
        assert [row["nodes"] for row in rows] == ["node1", "node1, node2", "node1, node2, node3 and 2 more"]
        statistics = await agent.call("get_statistics", **SESSION)
        assert statistics["nodes"] == {"node1": 3, "node2": 2, "node3": 1, "node4": 1, "node5": 1}
        assert "Tasks by node: node1 3, node2 2, node3 1, node4 1, node5 1." in agent.texts[-1]


async def test_a_task_on_an_engine_of_one_node_has_no_word_of_nodes() -> None:
    async with open_agent() as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "one", "function": "math:pi"}])
        await agent.call("wait_tasks", **SESSION)
        for tool, more in (("get_result", {"task": "one"}), ("get_statistics", {})):
            assert "nodes" not in await agent.call(tool, **SESSION, **more)


async def test_a_task_in_python_has_its_nodes() -> None:
    async with Session(backends=[ScriptedBackend(on_nodes)]) as session:
        job = ComputeTask(executable="true", task_backend_specific_kwargs={"process_templates": [(2, {})]})
        assert (job.node, job.nodes) == (None, ())
        await session.submit_tasks([job])
        await job
        assert (job.node, job.nodes) == ("node1", ("node1", "node2"))


def test_the_nodes_of_an_outcome_are_stored_and_outcomes_without_stay_as_they_were() -> None:
    outcome = Outcome(state=TaskState.DONE, ended=2.0, nodes=("node1",))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(outcome), type=Outcome) == outcome
    plain = msgspec.structs.replace(outcome, nodes=())
    assert msgspec.to_builtins(plain) == {"state": "DONE", "ended": 2.0}
