"""Plans the allocation of a session: what the scheduler is asked for, and how many node-hours that is at most."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.engine.network.addresses import NETWORK_PREFIX
from rhapsody_mcp.model.errors import InvalidRequest, SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.runtime.policy import Policy
from rhapsody_mcp.schedulers.allocation import Allocation, current_allocation
from rhapsody_mcp.schedulers.base import AllocationRequest, Scheduler, Verdict
from rhapsody_mcp.schedulers.detection import choose_scheduler, scheduler_here
from rhapsody_mcp.schedulers.options import AllocationProfile, SchedulerOptions, with_profile
from rhapsody_mcp.schedulers.ssh_hosts import SshHosts
from rhapsody_mcp.settings import Settings

__all__ = ["DEFAULT_MINUTES", "AllocationPlan", "ask_scheduler", "plan_allocation"]

DEFAULT_MINUTES = 60
_CHECK_S = 30.0
"""How long the scheduler may take to say whether it would take a job, in seconds; many clients give up after 60."""
_CHECK_SCRIPT = "#!/bin/sh\n:\n"


class AllocationPlan(msgspec.Struct, frozen=True):
    """What the scheduler is asked for when the first task needs it."""

    nodes: int
    minutes: int
    options: SchedulerOptions

    @property
    def node_hours(self) -> float:
        """The most that the session may use."""
        return self.nodes * self.minutes * self.options.allocations / 60

    @property
    def request(self) -> AllocationRequest:
        fields = ("partition", "account", "qos", "constraint", "reservation", "gpus_per_node", "lines")
        chosen = {field: getattr(self.options, field) for field in fields}
        return AllocationRequest(nodes=self.nodes, minutes=self.minutes, **chosen)

    def open_scheduler(self) -> Scheduler:
        return SshHosts(self.options.hosts) if self.options.hosts else scheduler_here()


def plan_allocation(
    nodes: int | None, minutes: int | None, scheduler: Mapping[str, Any] | None, settings: Settings
) -> AllocationPlan | None:
    """The allocation that a session with these arguments asks for; None where the session runs on the nodes that this
    process has. A profile of the settings fills in what is left open.

    Raises InvalidRequest where this machine has no scheduler, an argument has no effect, or a limit is exceeded.
    """
    if nodes is None and minutes is None and scheduler is None:
        return None
    if (own := current_allocation(os.environ)) is not None:
        _check_own(own, nodes, minutes, scheduler)
        return None
    options, profile = with_profile(scheduler or {}, settings.allocation_profiles, settings.default_profile)
    _check_policy(scheduler or {}, options, Policy.of(settings))
    if nodes is None and profile.nodes is None and not options.hosts:
        without = "scheduler" if minutes is None else "minutes"
        raise InvalidRequest(f"{without} has no effect without nodes: give nodes too, as in nodes=1.", field=without)
    if not options.hosts and (found := choose_scheduler()).scheduler is None:
        raise InvalidRequest(
            f"nodes needs a scheduler: {found.problem}. Leave nodes out to run on this machine; or start the "
            "service on a login node of the cluster, or inside a job; or name hosts that ssh reaches, as in "
            'scheduler={"hosts": ["n1", "n2"]}.',
            field="nodes",
        )
    planned_nodes = nodes or profile.nodes or len(options.hosts)
    if options.hosts and planned_nodes > len(options.hosts):
        raise InvalidRequest(
            f"nodes is {planned_nodes}, and hosts in scheduler are {len(options.hosts)}: {', '.join(options.hosts)}. "
            "Give nodes as many as hosts at most, or more hosts.",
            field="nodes",
        )
    planned_minutes = minutes or profile.minutes or min(DEFAULT_MINUTES, profile.max_minutes or DEFAULT_MINUTES)
    _check_limits(planned_nodes, planned_minutes, options.profile, profile)
    return AllocationPlan(planned_nodes, planned_minutes, _with_prefix(options, profile))


def _check_own(own: Allocation, nodes: int | None, minutes: int | None, scheduler: Mapping[str, Any] | None) -> None:
    where = f"job {own.job_id} of {own.scheduler}, in which this service runs, and which has {len(own.nodes)} nodes"
    for field, value in (("minutes", minutes), ("scheduler", scheduler)):
        if value is not None:
            raise InvalidRequest(
                f"{field} has no effect: sessions use the nodes of {where}. Leave {field} out; or start the service "
                "outside of jobs, such as on a login node.",
                field=field,
            )
    if nodes is not None and own.nodes and nodes > len(own.nodes):
        raise InvalidRequest(
            f"nodes is {nodes}, and sessions use the nodes of {where}. Valid is 1 to {len(own.nodes)}.", field="nodes"
        )


def _check_policy(given: Mapping[str, Any], options: SchedulerOptions, policy: Policy) -> None:
    """What the settings say themselves, in a profile, is allowed."""
    for key in ("setup", "lines", "hosts"):
        if given.get(key):
            policy.check_setup(f"{key} in scheduler")
    if given.get("python"):
        policy.check_executable("python in scheduler", options.python)


def _check_limits(nodes: int, minutes: int, name: str, profile: AllocationProfile) -> None:
    for field, value, most in (("nodes", nodes, profile.max_nodes), ("minutes", minutes, profile.max_minutes)):
        if most is not None and value > most:
            raise InvalidRequest(
                f"{field} is {value}, and max_{field} of profile {name} in the settings of this server is {most}. Give "
                f"{most} or less, or ask the person who runs the server.",
                field=field,
            )


def _with_prefix(options: SchedulerOptions, profile: AllocationProfile) -> SchedulerOptions:
    """The options with the network prefix as a line of the job script, which the pilot and its nodes inherit."""
    if not profile.network_prefix:
        return options
    line = f"export {NETWORK_PREFIX}={shlex.quote(profile.network_prefix)}"
    return replace(options, setup=(line, *options.setup))


async def ask_scheduler(
    plan: AllocationPlan, scheduler: Scheduler | None = None, within_s: float = _CHECK_S
) -> Verdict:
    """What the scheduler, by default that of the plan, says of the allocation.

    Nothing is submitted. Raises SchedulerRefusal where the scheduler would not take the job, and SchedulerUnavailable.
    """
    try:
        async with asyncio.timeout(within_s):
            verdict = await (scheduler or plan.open_scheduler()).check(plan.request, _CHECK_SCRIPT)
    except TimeoutError:
        raise SchedulerUnavailable(
            f"the scheduler gave no answer within {within_s:g} s: it is busy or down. Nothing was opened; try again "
            "later, or leave nodes out to run on this machine."
        ) from None
    if not verdict.accepted:
        raise SchedulerRefusal(f"the scheduler would refuse the job: {verdict.words.rstrip('.')}. {verdict.valid}")
    return verdict
