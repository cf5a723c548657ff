"""The contract of all schedulers, and the values that they take and return."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest

__all__ = ["AllocationRequest", "JobState", "JobStatus", "Partition", "Scheduler", "Verdict", "no_interpreter"]


def no_interpreter() -> InvalidRequest:
    """What is wrong with a job script that does not begin with "#!"."""
    return InvalidRequest("a job script must begin with '#!' and the path of an interpreter, such as '#!/bin/sh'.")


class AllocationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes that a job asks for; an empty text leaves the choice to the scheduler.

    `signal_s` is how long before the time limit the job script gets SIGUSR1; None for no signal. `lines` are further
    options of the scheduler's submit command, each in one text, such as "--exclusive=user"; an option in `lines`
    overrides the same option from another field. Raises InvalidRequest.
    """

    nodes: int
    minutes: int
    job_name: str = "rhapsody-mcp"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    gpus_per_node: int = 0
    signal_s: int | None = None
    lines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, least in [("nodes", 1), ("minutes", 1), ("gpus_per_node", 0)]:
            if getattr(self, field) < least:
                wrong = f"{field} of an allocation is {getattr(self, field)}; valid is {least} or more."
                raise InvalidRequest(wrong, field=field)
        for line in self.lines:
            if not line.startswith("-"):
                raise InvalidRequest(
                    f"a line for the scheduler is {line!r}; valid is one option of the submit command with its value, "
                    "such as '--exclusive=user'.",
                    field="lines",
                )


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """A set of nodes with limits of its own; PBS and LSF call a partition a queue.

    `idle` counts the nodes that no job uses and that work. Where the nodes differ, `cores` and `memory_mb` are those of
    the smallest node, and `gpus` is the number of the node with the most. `limit_minutes` and `max_nodes` are the
    limits of one job, None for no limit.
    """

    name: str
    default: bool
    state: str
    nodes: int
    idle: int
    cores: int
    memory_mb: int
    gpus: int
    limit_minutes: int | None
    max_nodes: int | None

    def why_too_small(self, request: AllocationRequest) -> str:
        """The limit that the request exceeds; empty where the request fits.

        A QOS or a reservation may lift the limits of jobs: where the request names one, only the nodes count.
        """
        lifted = bool(request.qos or request.reservation)
        if request.nodes > self.nodes:
            return f"partition {self.name} has {self.nodes} nodes, and {request.nodes} were asked for"
        if not lifted and self.max_nodes is not None and request.nodes > self.max_nodes:
            return f"partition {self.name} gives a job {self.max_nodes} nodes at most, not {request.nodes}"
        if not lifted and self.limit_minutes is not None and request.minutes > self.limit_minutes:
            return f"partition {self.name} gives a job {self.limit_minutes} minutes at most, not {request.minutes}"
        if request.gpus_per_node > self.gpus:
            return f"partition {self.name} has nodes with {self.gpus} GPUs at most, not {request.gpus_per_node}"
        return ""


class Verdict(msgspec.Struct, frozen=True):
    """What the scheduler says of a request that it was only asked about.

    `words` are the scheduler's own. `starts_at` is the estimated start, in seconds since the epoch, None where there
    is no estimate; `nodes` are the nodes that the estimate is for. `valid` says what is valid where the request is not
    accepted. `is_asked` is False for a scheduler that cannot be asked without a submission: `words` are then ours, and
    such a request counts as accepted.
    """

    accepted: bool
    words: str
    starts_at: float | None = None
    nodes: tuple[str, ...] = ()
    valid: str = ""
    is_asked: bool = True


class JobState(StrEnum):
    """The state of a job; UNKNOWN means that the scheduler has forgotten the job, and not that the job failed."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    ENDED = "ENDED"
    UNKNOWN = "UNKNOWN"


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler knows of a job; times are in seconds since the epoch, None where unknown.

    `scheduler_state` is the scheduler's own word, such as PENDING, COMPLETING, COMPLETED, TIMEOUT or NODE_FAIL, and
    `reason` the scheduler's reason; `explanation` says in plain words what the reason means, empty for a rare one.
    `estimated_start` is set while the job is PENDING. `ends_at` is the time limit while the job runs, and then the
    time of the end. `exit_code` of a job that ended by a signal is the negative number of the signal.
    """

    state: JobState
    scheduler_state: str = ""
    reason: str = ""
    explanation: str = ""
    nodes: tuple[str, ...] = ()
    submitted_at: float | None = None
    started_at: float | None = None
    estimated_start: float | None = None
    ends_at: float | None = None
    exit_code: int | None = None

    @property
    def words(self) -> str:
        """The state with its reason, as in "PENDING, Resources: waits until enough nodes are free"."""
        state = self.scheduler_state or f"{self.state}: the scheduler does not know the job any more"
        return ", ".join(filter(None, [state, self.because]))

    @property
    def because(self) -> str:
        """The reason with its explanation; may be empty."""
        reason = self.reason if self.reason not in ("", "None") else ""
        return ": ".join(filter(None, [reason, self.explanation]))


class Scheduler(Protocol):
    """A scheduler. Each call raises SchedulerUnavailable where the scheduler does not answer in time.

    The processes of a call end with the call, also with one that is canceled.
    """

    name: str

    async def version(self) -> str:
        """The name and version of the scheduler's commands; a scheduler that does not answer is not needed."""
        ...

    async def submit(self, request: AllocationRequest, script: str, log: Path) -> str:
        """Submit a job, and return its id, upon which the scheduler will run the script once, on the first node.

        The script must begin with "#!". The job runs in the folder of `log`, which the nodes must see; stdout and
        stderr are appended to `log`. The job keeps its nodes for itself, goes on when one of its nodes dies, and is not
        run again, unless `lines` of the request say otherwise.

        Raises SchedulerRefusal where the scheduler does not take the job, or would never start the job. After
        SchedulerUnavailable the job may exist: `find_jobs` tells.
        """
        ...

    async def check(self, request: AllocationRequest, script: str) -> Verdict:
        """Ask whether `submit` would be accepted; nothing is submitted."""
        ...

    async def status(self, job_ids: Collection[str]) -> dict[str, JobStatus]:
        """What the scheduler knows of these jobs: an entry for each."""
        ...

    async def dead_script_node(self, job_id: str) -> str:
        """The node on which the script of a running job ran, where the scheduler takes that node for dead: the job may
        go on without it. Empty where the node lives, or where the scheduler has no such word."""
        return ""

    async def find_jobs(self, job_name: str) -> list[str]:
        """The ids of this user's jobs with this name that the scheduler still remembers, also ended ones."""
        ...

    async def cancel(self, job_id: str) -> None:
        """Ask the scheduler to end the job, which may take as long as the scheduler's grace time.

        Does nothing to a job that has ended or is unknown.
        """
        ...

    async def partitions(self) -> list[Partition]:
        """The partitions that this user can see."""
        ...
