"""Steps on nodes of the allocation that this process is in: by srun in a job of Slurm, else by ssh."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from rhapsody_mcp.model.errors import SchedulerUnavailable
from rhapsody_mcp.schedulers.allocation import current_allocation
from rhapsody_mcp.schedulers.commands import run_command

__all__ = ["SHARING", "end_orphaned_steps", "has_srun", "step_on", "succeeds"]

_NAME = "rhapsody-mcp"
SHARING = ("--overlap", "--cpu-bind=none", "--no-kill", "--kill-on-bad-exit=0", "--chdir=/")
"""Options of srun for a step that shares its nodes with other steps, and goes on where a node or a task dies."""
_WITHIN_S = 10.0
_STEP_LINE = re.compile(rf"^StepId=(\S+) .* Name=(?:{_NAME}|dragon-\S+) .*SrunHost:Pid=([^:\s]+):(\d+)", re.MULTILINE)


def has_srun() -> bool:
    """Return whether this process is in a job of Slurm."""
    allocation = current_allocation(os.environ)
    return allocation is not None and allocation.scheduler == "slurm"


def step_on(nodes: Sequence[str], command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` once on each of these nodes, with the environment of the caller."""
    if not has_srun():
        return [sys.executable, "-m", "rhapsody_mcp.engine.ssh_launcher", ",".join(nodes), *command]
    count = str(len(nodes))
    where = ["-N", count, "-n", count, "--ntasks-per-node=1", "-w", ",".join(nodes)]
    return ["srun", *SHARING, "--whole", "--mpi=none", f"--job-name={_NAME}", *where, *command]


async def succeeds(command: Sequence[str], environment: Mapping[str, str], within_s: float) -> bool:
    """Run a command; return whether it ends in time with exit code 0. A cancellation kills the command."""
    try:
        return (await run_command(command, environment, within_s=within_s)).exit_code == 0
    except SchedulerUnavailable:
        return False


async def end_orphaned_steps(environment: Mapping[str, str]) -> None:
    """End the steps of this package and of Dragon whose srun was killed on this node: their processes on other nodes go
    on, and later steps would wait for them. Gives up where Slurm does not answer. Steps by ssh leave nothing."""
    if not has_srun():
        return
    with suppress(SchedulerUnavailable):
        steps = await run_command(["scontrol", "show", "steps", "-o"], environment, within_s=_WITHIN_S)
        if orphans := _orphans(steps.stdout, environment.get("SLURM_JOB_ID", "")):
            await run_command(["scancel", *orphans], environment, within_s=_WITHIN_S)


def _orphans(steps: str, job_id: str) -> list[str]:
    return [
        step
        for step, host, pid in _STEP_LINE.findall(steps)
        if step.startswith(f"{job_id}.") and host == socket.gethostname() and not os.path.exists(f"/proc/{pid}")
    ]
