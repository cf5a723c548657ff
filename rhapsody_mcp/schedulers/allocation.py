"""The allocation that a process is in, by its environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from rhapsody_mcp.schedulers.hostlist import expand_hostlist, expand_repeats

__all__ = ["HOSTS", "HOSTS_END", "HOSTS_JOB", "Allocation", "current_allocation"]

HOSTS, HOSTS_END, HOSTS_JOB = "RHAPSODY_HOSTS", "RHAPSODY_HOSTS_END", "RHAPSODY_HOSTS_JOB"
"""Variables of an allocation of ssh hosts: their names with commas, its end in seconds since the epoch, its id."""


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes of a job. Names stand in the scheduler's order; the job script runs on the first node.

    `cores` has one number a node, and is empty where unknown. `ends_at` is the time limit in seconds since the epoch,
    None where the environment has no time: the scheduler's status of the job may have one. `gpus_per_node` is 0 where
    the job asked for none, or where unknown.
    """

    scheduler: str
    job_id: str
    nodes: tuple[str, ...]
    cores: tuple[int, ...] = ()
    gpus_per_node: int = 0
    ends_at: float | None = None


def current_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """The allocation that a process with these variables is in; None outside of one.

    Without a scheduler, RHAPSODY_HOSTS names hosts that ssh reaches. A process that outlived its job still has the
    variables.
    """
    if environment.get("SLURM_JOB_ID"):
        return _slurm_allocation(environment)
    if environment.get("PBS_NODEFILE"):
        return _pbs_allocation(environment)
    if environment.get("LSB_JOBID"):
        return _lsf_allocation(environment)
    if environment.get("PE_HOSTFILE"):
        return _grid_engine_allocation(environment)
    if environment.get(HOSTS):
        return _ssh_allocation(environment)
    return None


def _slurm_allocation(environment: Mapping[str, str]) -> Allocation:
    end = environment.get("SLURM_JOB_END_TIME", "")  # Slurm 22.05 and older have no such variable
    return Allocation(
        scheduler="slurm",
        job_id=environment["SLURM_JOB_ID"],
        nodes=expand_hostlist(environment.get("SLURM_JOB_NODELIST", environment.get("SLURM_NODELIST", ""))),
        cores=expand_repeats(environment.get("SLURM_JOB_CPUS_PER_NODE", "")),
        gpus_per_node=_gpus(environment),
        ends_at=float(end) if end.isdigit() else None,
    )


def _gpus(environment: Mapping[str, str]) -> int:
    """Of "4", "a100:4" or "a100:2,v100:2"; the number on this node comes first, because an exclusive job gets all."""
    text = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE") or ""
    return sum(int(number) for number in re.findall(r"(?:^|[:,])(\d+)(?=,|$)", text))


def _pbs_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """PBS writes a file with one line a slot at the start of the job; None where the file is gone, as after the end.

    Of the time limit, only Torque has a variable.
    """
    file = Path(environment["PBS_NODEFILE"])
    try:
        names, began = file.read_text(encoding="utf-8").split(), file.stat().st_mtime
    except OSError:
        return None
    limit_s = environment.get("PBS_WALLTIME", "")
    return Allocation(
        scheduler="pbs",
        job_id=environment.get("PBS_JOBID", ""),
        nodes=tuple(dict.fromkeys(names)),
        gpus_per_node=_visible_gpus(environment),
        ends_at=began + int(limit_s) if limit_s.isdigit() else None,
    )


def _lsf_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """LSF has a file with one line a slot, and a variable as in "node1 16 node2 16"."""
    try:
        names = Path(environment["LSB_DJOB_HOSTFILE"]).read_text(encoding="utf-8").split()
    except (KeyError, OSError):
        names = environment.get("LSB_MCPU_HOSTS", "").split()[::2]
    if not names:
        return None
    nodes, gpus = tuple(dict.fromkeys(names)), _visible_gpus(environment)
    return Allocation(scheduler="lsf", job_id=environment["LSB_JOBID"], nodes=nodes, gpus_per_node=gpus)


def _grid_engine_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Grid Engine has a file with the name, the slots and the queue of a node on each line."""
    try:
        lines = Path(environment["PE_HOSTFILE"]).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    nodes = tuple(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    return Allocation(scheduler="grid-engine", job_id=environment.get("JOB_ID", ""), nodes=nodes)


def _visible_gpus(environment: Mapping[str, str]) -> int:
    """The GPUs of this node that the scheduler has left visible; 0 where the scheduler does not say."""
    return len([gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()])


def _ssh_allocation(environment: Mapping[str, str]) -> Allocation:
    end = environment.get(HOSTS_END, "")
    return Allocation(
        scheduler="ssh",
        job_id=environment.get(HOSTS_JOB, ""),
        nodes=tuple(filter(None, environment[HOSTS].split(","))),
        ends_at=float(end) if end.isdigit() else None,
    )
