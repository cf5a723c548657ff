"""The time of nodes that a session has used."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.pilot.messages import PilotReady
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus

__all__ = ["AllocationHistory", "NodeTime", "node_time"]

_HISTORY = "allocations.jsonl"


class NodeTime(msgspec.Struct, frozen=True, array_like=True):
    """The nodes of one job, from its start to its end. `counts` says whether it is one of the session's `allocations`:
    one whose pilot never came is not, and neither is one that was given back because no task needed it."""

    job: str
    nodes: int
    started: float
    ended: float
    counts: bool = True

    @property
    def node_s(self) -> float:
        return self.nodes * max(0.0, self.ended - self.started)


class AllocationHistory:
    """The jobs of a session that are over, kept in the folder of the session."""

    def __init__(self) -> None:
        self._jobs: list[NodeTime] | None = None

    def add(self, folder: Path, job: NodeTime | None) -> None:
        """Add a job; None stands for a job that never started."""
        if job is None:
            return
        self.jobs(folder).append(job)
        with suppress(OSError), (folder / _HISTORY).open("ab") as file:
            file.write(msgspec.json.encode(job) + b"\n")

    def jobs(self, folder: Path) -> list[NodeTime]:
        if self._jobs is None:
            self._jobs = []
            with suppress(OSError, msgspec.DecodeError):
                lines = (folder / _HISTORY).read_bytes().splitlines()
                self._jobs = [msgspec.json.decode(line, type=NodeTime) for line in lines]
        return self._jobs

    def minutes_left(self, folder: Path, nodes: int, minutes: int, allocations: int) -> int:
        """The minutes of the next job of a session that may have `allocations` jobs of `minutes`; 0 where it may have
        no further one."""
        jobs = self.jobs(folder)
        if sum(job.counts for job in jobs) >= allocations:
            return 0
        used = sum(job.node_s for job in jobs) / 60 / nodes
        return max(0, min(minutes, round(minutes * allocations - used)))


def node_time(
    job: str,
    request: AllocationRequest,
    status: JobStatus | None,
    pilot: PilotReady | None,
    *,
    had_pilot: bool = False,
) -> NodeTime | None:
    """The nodes that the job has had, until now or until its end; None where the job has not started."""
    started = status.started_at if status is not None else None
    if started is None and pilot is not None:
        started = pilot.ends - 60 * request.minutes
    if started is None and had_pilot:  # an earlier service saw the pilot: the job may have had all its time
        started = time.time() - 60 * request.minutes
    if started is None:
        return None
    nodes = len(status.nodes) if status is not None and status.nodes else request.nodes
    ended = status.ends_at if status is not None and status.state is JobState.ENDED else None
    return NodeTime(job, nodes, started, time.time() if ended is None else ended)
