"""The state of an allocation, as data and in words."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.backends.pilot.messages import PilotReady
from rhapsody_mcp.backends.pilot.node_time import NodeTime, node_time
from rhapsody_mcp.schedulers.base import AllocationRequest, JobStatus

__all__ = ["AllocationFacts", "allocation_text", "clock", "make_facts", "span", "used_up_text"]

_NODES_SHOWN = 4


class AllocationFacts(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`nodes` and `minutes` are what one job asks for. Times are in seconds since the epoch.

    `state` is the scheduler's word, such as PENDING or RUNNING; empty without a job. `since` is when the job was
    submitted, or started where it runs. `node_s` are the seconds of nodes that the session has used until now, in all
    its jobs, of which `ended` are over; `allocations` is how many it may have. `left_minutes`, without a job, are what
    the next one may take: 0 where the session can have no other.
    """

    nodes: int
    minutes: int
    allocations: int = 1
    job: str = ""
    state: str = ""
    reason: str = ""
    since: float | None = None
    estimated_start: float | None = None
    ends_at: float | None = None
    on: tuple[str, ...] = ()
    ended: int = 0
    node_s: float = 0.0
    left_minutes: int | None = None

    @property
    def left_s(self) -> float | None:
        return max(0.0, self.ends_at - time.time()) if self.ends_at is not None and self.on else None


def make_facts(
    request: AllocationRequest,
    allocations: int,
    ended: Sequence[NodeTime],
    job: str,
    status: JobStatus | None,
    pilot: PilotReady | None,
    left_minutes: int | None = None,
) -> AllocationFacts:
    """The facts of a session whose jobs `ended` are over; without `job`, the session has none now."""
    current = node_time(job, request, status, pilot) if job else None
    used = sum(each.node_s for each in ended) + (current.node_s if current is not None else 0.0)
    plan = AllocationFacts(
        nodes=request.nodes, minutes=request.minutes, allocations=allocations, ended=len(ended), node_s=round(used, 1)
    )
    if not job:
        return replace(plan, left_minutes=left_minutes)
    if pilot is not None:
        on = pilot.nodes or (status.nodes if status is not None else ()) or (pilot.host,)
        since = current.started if current is not None else None
        return replace(plan, job=job, state="RUNNING", since=since, ends_at=pilot.ends, on=on)
    if status is None:
        return replace(plan, job=job, state="submitted")
    return replace(
        plan,
        job=job,
        state=status.scheduler_state or status.state.value,
        reason=status.because,
        since=status.submitted_at if status.started_at is None else status.started_at,
        estimated_start=status.estimated_start,
        ends_at=status.ends_at,
        on=status.nodes,
    )


def allocation_text(facts: AllocationFacts) -> str:
    """As in "job 12 PENDING for 3 min, Resources: waits until enough nodes are free; estimated start in 12 min"."""
    if not facts.job:
        if facts.left_minutes == 0:
            return f"no job: the time is used up, with {facts.ended} that ended, and no further task runs"
        before = f", after {facts.ended} that ended," if facts.ended else ""
        minutes = facts.minutes if facts.left_minutes is None else facts.left_minutes
        nodes = "1 node" if facts.nodes == 1 else f"{facts.nodes} nodes"
        return f"no job{before} until a task needs one: {nodes} for {span(60 * minutes)}"
    since = f" for {span(time.time() - facts.since)}" if facts.since is not None else ""
    reason = f", {facts.reason}" if facts.reason else ""
    where = f" on {_listed(facts.on)}" if facts.on else ""
    left = f", {span(facts.left_s)} left" if facts.left_s is not None else ""
    start = f"; estimated start {clock(facts.estimated_start)}" if facts.estimated_start is not None else ""
    return f"job {facts.job} {facts.state}{where}{since}{reason}{left}{start}"


def used_up_text(allocations: int, minutes: int) -> str:
    """The error of a session that can have no further job."""
    jobs = "1 job" if allocations == 1 else f"{allocations} jobs, one after the other, each"
    return (
        f"the time of this session is used up: it may have {jobs} of {minutes} min (minutes, and allocations in "
        "scheduler, of create_session). Its results can be read; open another session for further tasks."
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NODES_SHOWN
    return ", ".join(names[:_NODES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def span(seconds: float) -> str:
    """As in "45 s", "12 min", "3 h 5 min" or "2 d 4 h"."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min".removesuffix(" 0 min")
    return f"{int(hours // 24)} d {int(hours % 24)} h".removesuffix(" 0 h")


def clock(at: float) -> str:
    """As in "2026-11-28 21:30 UTC, in 12 min"."""
    words = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at))
    return f"{words}, in {span(at - time.time())}" if at > time.time() else words
