"""What `describe_system` says of the scheduler: partitions, the allocation of this process, profiles."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from rhapsody_mcp.backends.pilot.allocation_facts import span
from rhapsody_mcp.schedulers.allocation import Allocation
from rhapsody_mcp.schedulers.base import Partition
from rhapsody_mcp.schedulers.detection import NO_SCHEDULER, SchedulerDescription
from rhapsody_mcp.schedulers.options import AllocationProfile
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.replies.formatting import limited_list, one_line

__all__ = ["scheduler_data", "scheduler_text"]

_PARTITIONS, _NODES = 20, 8
_HIDDEN = ("setup", "lines")
"""Options of a profile that may hold secrets."""


def scheduler_data(description: SchedulerDescription, settings: Settings) -> dict[str, Any] | None:
    """None on a machine without a scheduler."""
    profiles = {name: _shown(profile) for name, profile in settings.allocation_profiles.items()}
    parts = {
        "name": description.name,
        "version": description.version,
        "problem": "" if description.problem == NO_SCHEDULER else description.problem,
        "partitions": msgspec.to_builtins(description.partitions[:_PARTITIONS]),
        "allocation": msgspec.to_builtins(description.allocation),
        "profiles": profiles,
    }
    return {key: part for key, part in parts.items() if part} or None


def scheduler_text(description: SchedulerDescription, settings: Settings) -> list[str]:
    if description.allocation is not None:
        return [_allocation_line(description.allocation)]
    if description.problem == NO_SCHEDULER:
        return [
            "No scheduler here: create_session takes nodes only with hosts that ssh reaches, as in "
            'scheduler={"hosts": ["n1", "n2"]}.',
            *_profile_lines(settings),
        ]
    if description.problem:
        return [f"The scheduler cannot be used now: {one_line(description.problem).rstrip('.')}."]
    lines = [f"Scheduler, for create_session with nodes: {one_line(description.version)}."]
    lines += [f"- {_partition_line(partition)}" for partition in description.partitions[:_PARTITIONS]]
    if (more := len(description.partitions) - _PARTITIONS) > 0:
        lines.append(f"- and {more} more partitions")
    return lines + _profile_lines(settings)


def _allocation_line(allocation: Allocation) -> str:
    names = limited_list(allocation.nodes, _NODES)
    left = f", {span(allocation.ends_at - time.time())} left" if allocation.ends_at is not None else ""
    return (
        f"This service runs inside job {allocation.job_id} of {allocation.scheduler}, with {len(allocation.nodes)} "
        f"nodes: {names}{left}. create_session(nodes={len(allocation.nodes)}) uses them."
    )


def _partition_line(partition: Partition) -> str:
    default = " (default)" if partition.default else ""
    state = "" if partition.state == "up" else f" is {partition.state},"
    gpus = f", {partition.gpus} GPUs" if partition.gpus else ""
    limit = "no time limit" if partition.limit_minutes is None else f"{partition.limit_minutes} minutes"
    nodes = "" if partition.max_nodes is None else f", {partition.max_nodes} nodes"
    return (
        f"partition {partition.name}{default}:{state} {partition.idle} of {partition.nodes} nodes idle, each "
        f"{partition.cores} cores, {partition.memory_mb / 1024:.3g} GiB{gpus}; a job at most: {limit}{nodes}"
    )


def _profile_lines(settings: Settings) -> list[str]:
    return [
        f"- profile {name}{' (default)' if name == settings.default_profile else ''}: "
        f"{', '.join(f'{key} {value}' for key, value in _shown(profile).items()) or 'no option'}"
        for name, profile in settings.allocation_profiles.items()
    ]


def _shown(profile: AllocationProfile) -> Mapping[str, Any]:
    options: dict[str, Any] = msgspec.to_builtins(profile)
    return {key: value for key, value in options.items() if key not in _HIDDEN}
