"""Finds the scheduler of this machine, and describes it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from rhapsody_mcp.model.errors import SchedulerUnavailable
from rhapsody_mcp.schedulers.allocation import Allocation, current_allocation
from rhapsody_mcp.schedulers.base import Partition, Scheduler
from rhapsody_mcp.schedulers.parsl_kinds import GRID_ENGINE, LSF, PBS_PRO, TORQUE, ParslKind
from rhapsody_mcp.schedulers.parsl_providers import ParslScheduler
from rhapsody_mcp.schedulers.slurm import Slurm

__all__ = [
    "NO_SCHEDULER",
    "FoundScheduler",
    "SchedulerDescription",
    "choose_scheduler",
    "describe_scheduler",
    "find_scheduler",
    "scheduler_here",
]

_DESCRIBE_S = 5.0
_VERSION_S = 5.0
NO_SCHEDULER = (
    "no scheduler was found: none of sbatch (Slurm), qsub (PBS Pro, Torque, Grid Engine) and bsub (LSF) is on PATH"
)
_NO_EXTRA = "{} was found; its support needs the extra: pip install 'rhapsody-mcp[parsl]'"
_CONDOR = "HTCondor was found, whose jobs have one node each: sessions with nodes do not support it"


class FoundScheduler(msgspec.Struct, frozen=True):
    """The scheduler with its partitions, or None and the reason why there is none."""

    scheduler: Scheduler | None
    partitions: tuple[Partition, ...] = ()
    problem: str = ""


def scheduler_here() -> Scheduler:
    """The scheduler of this machine; where there is none, one whose calls raise SchedulerUnavailable."""
    return choose_scheduler().scheduler or Slurm()


def choose_scheduler(environment: Mapping[str, str] | None = None) -> FoundScheduler:
    """The scheduler whose commands are on the PATH of these variables, by default those of this process.

    No scheduler is asked: the partitions stay empty.
    """
    variables = os.environ if environment is None else environment
    if _which("sbatch", variables):
        return FoundScheduler(Slurm(variables))
    kind = _parsl_kind(variables)
    if kind is None:
        return FoundScheduler(None, problem=_CONDOR if _which("condor_submit", variables) else NO_SCHEDULER)
    if importlib.util.find_spec("parsl") is None:
        return FoundScheduler(None, problem=_NO_EXTRA.format(kind.title))
    return FoundScheduler(ParslScheduler(kind, variables))


def _parsl_kind(variables: Mapping[str, str]) -> ParslKind | None:
    if _which("qsub", variables):
        if variables.get("SGE_ROOT"):
            return GRID_ENGINE
        return PBS_PRO if _is_pbs_pro(_which("qstat", variables)) else TORQUE
    return LSF if _which("bsub", variables) else None


def _which(command: str, variables: Mapping[str, str]) -> str:
    return shutil.which(command, path=variables.get("PATH")) or ""


@lru_cache
def _is_pbs_pro(qstat: str) -> bool:
    """Whether the qstat of this path is PBS Pro's; the command asks no server."""
    try:
        version = subprocess.run([qstat, "--version"], capture_output=True, text=True, timeout=_VERSION_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "pbs_version" in version.stdout or "PBSPro" in version.stdout


async def find_scheduler(environment: Mapping[str, str] | None = None) -> FoundScheduler:
    """The scheduler of `choose_scheduler` with its partitions; None also for one that does not answer."""
    found = choose_scheduler(environment)
    if found.scheduler is None:
        return found
    try:
        return FoundScheduler(found.scheduler, tuple(await found.scheduler.partitions()))
    except SchedulerUnavailable as error:
        return FoundScheduler(None, problem=str(error))


class SchedulerDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of a scheduler: `problem` says why `name` is empty; `allocation` is that of this process."""

    name: str = ""
    version: str = ""
    partitions: tuple[Partition, ...] = ()
    allocation: Allocation | None = None
    problem: str = ""


async def describe_scheduler(
    environment: Mapping[str, str] | None = None, within_s: float = _DESCRIBE_S
) -> SchedulerDescription:
    """Describe the scheduler of this machine, also where none is found, or where it does not answer in time."""
    allocation = current_allocation(os.environ if environment is None else environment)
    try:
        async with asyncio.timeout(within_s):
            found = await find_scheduler(environment)
            version = await found.scheduler.version() if found.scheduler else ""
    except TimeoutError:
        problem = f"the scheduler gave no answer within {within_s:g} s: it is busy or down"
        return SchedulerDescription(allocation=allocation, problem=problem)
    name = found.scheduler.name if found.scheduler else ""
    return SchedulerDescription(
        name=name, version=version, partitions=found.partitions, allocation=allocation, problem=found.problem
    )
