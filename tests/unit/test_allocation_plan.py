"""A scheduler that hangs holds nothing up; nodes without Slurm are for the local backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.backends.compute.nodes.allocated import AllocatedNodes
from rhapsody_mcp.backends.compute.nodes.steps import step_on
from rhapsody_mcp.model.errors import InvalidRequest, InvalidSettings, SchedulerUnavailable
from rhapsody_mcp.runtime.allocation_plan import ask_scheduler, plan_allocation
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.schedulers.detection import describe_scheduler
from rhapsody_mcp.schedulers.options import SchedulerOptions
from rhapsody_mcp.settings import Settings
from tests.slurm_stand_in import SlurmStandIn

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("command", ["sinfo", "sbatch"])
async def test_a_scheduler_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    slurm = SlurmStandIn(tmp_path, monkeypatch)
    slurm.hang(command)
    plan = plan_allocation(2, 10, None, Settings())
    assert plan is not None
    with pytest.raises(SchedulerUnavailable, match=r"no answer within 0.3 s: it is busy or down. Nothing was opened"):
        await ask_scheduler(plan, within_s=0.3)
    described = await describe_scheduler(within_s=0.3)
    assert (described.name, described.problem) == ("", "the scheduler gave no answer within 0.3 s: it is busy or down")


def test_nodes_without_slurm_are_for_the_local_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RHAPSODY_HOSTS": "me@n1,n2", "RHAPSODY_HOSTS_JOB": "job-a@n1", "RHAPSODY_HOSTS_END": "1795896817"}
    nodes = AllocatedNodes(2, variables)
    nodes.lose("n1.site")
    assert (AllocatedNodes(None, variables).names(), nodes.names()) == (["me@n1", "n2"], ["n2"])
    assert AllocatedNodes(None, variables, slurm_only=True).count == 1
    words = "in jobs of Slurm alone, and this is job job-a@n1 of ssh: use the local backend"
    with pytest.raises(InvalidSettings, match=words):
        AllocatedNodes(2, variables, slurm_only=True)
    config = SessionConfig(backends=("dragon",), nodes=2, scheduler=SchedulerOptions(hosts=("n1", "n2")))
    with pytest.raises(
        InvalidRequest, match="backends has dragon, which runs over several nodes in jobs of Slurm alone"
    ):
        plan_backends(config, Settings())
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert step_on(["n1", "n2"], ["true"])[1:] == ["-m", "rhapsody_mcp.engine.ssh_launcher", "n1,n2", "true"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert step_on(["n1", "n2"], ["true"])[0] == "srun"
