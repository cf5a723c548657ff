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
    """The nodes of one job, from its start to its end."""

    job: str
    nodes: int
    started: float
    ended: float

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


def node_time(
    job: str, request: AllocationRequest, status: JobStatus | None, pilot: PilotReady | None
) -> NodeTime | None:
    """The nodes that the job has had, until now or until its end; None where the job has not started."""
    started = status.started_at if status is not None else None
    if started is None and pilot is not None:
        started = pilot.ends - 60 * request.minutes
    if started is None:
        return None
    nodes = len(status.nodes) if status is not None and status.nodes else request.nodes
    ended = status.ends_at if status is not None and status.state is JobState.ENDED else None
    return NodeTime(job, nodes, started, time.time() if ended is None else ended)
