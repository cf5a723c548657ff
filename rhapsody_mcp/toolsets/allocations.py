"""What the tools say of the allocations of sessions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from mcp.server.mcpserver import Elicit

from rhapsody_mcp.backends.pilot.allocation_facts import AllocationFacts, allocation_text, clock, span, used_up_text
from rhapsody_mcp.model.errors import AllocationsUsedUp
from rhapsody_mcp.model.statistics import Statistics
from rhapsody_mcp.runtime.allocation_plan import AllocationPlan, ask_scheduler, plan_allocation
from rhapsody_mcp.runtime.backend_factory import SessionConfig
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.schedulers.base import Verdict
from rhapsody_mcp.toolsets.replies.formatting import call_text, limited_list
from rhapsody_mcp.toolsets.tooling.confirmation import CallContext, Confirm, ServerState, ask

__all__ = [
    "AllocationFacts",
    "allocation_data",
    "allocation_field",
    "allocation_of",
    "allocation_sentence",
    "ask_for_node_hours",
    "dry_run_text",
    "hours",
    "is_pending",
    "nodes_text",
    "plan_text",
    "planned_data",
    "refuse_used_up",
    "utilization",
]

_PENDING = "PENDING"
_NODES_SHOWN = 4


# --- before a session is open


async def ask_for_node_hours(
    nodes: int | None,
    minutes: int | None,
    scheduler: dict[str, Any] | None,
    dry_run: bool,
    force: bool,
    context: CallContext,
) -> Elicit[Confirm] | Confirm:
    """The question whether the open sessions and a new one may use more node-hours than the budget has."""
    state = ServerState.of(context)
    plan, budget = plan_allocation(nodes, minutes, scheduler, state.settings), state.settings.budget_node_hours
    if plan is None or budget is None or force or dry_run:
        return Confirm()
    others = _node_hours(one.config for one in state.sessions.all())
    if others + plan.node_hours <= budget:
        return Confirm()
    await ask_scheduler(plan)  # a person is not asked about a job that will be refused
    with_others = f", and the open sessions {hours(others)} more" if others else ""
    return ask(
        f"This session may use up to {hours(plan.node_hours)} ({_size(plan)}){with_others}; the budget is "
        f"{hours(budget)} (budget_node_hours in the server's settings).",
        context,
    )


def _node_hours(configs: Iterable[SessionConfig]) -> float:
    """The most that these sessions may use."""
    plans = [
        AllocationPlan(config.nodes, config.minutes, config.scheduler)
        for config in configs
        if config.nodes is not None and config.minutes is not None and config.scheduler is not None
    ]
    return sum(plan.node_hours for plan in plans)


def plan_text(plan: AllocationPlan) -> str:
    """What will be asked for, when, and what that may use."""
    return (
        f"its tasks run on {_size(plan)}, which the scheduler is asked for with the first task: "
        f"{hours(plan.node_hours)} at most; the job ends with the session, or when its engines stop"
    )


def _size(plan: AllocationPlan) -> str:
    """As in "2 nodes for 10 min (partition gpu, account m1234), up to 3 times"."""
    options = {
        field: getattr(plan.options, field) for field in ("profile", "partition", "account", "qos", "constraint")
    }
    options |= {"GPUs a node": plan.options.gpus_per_node, "reservation": plan.options.reservation}
    options |= {"hosts": ", ".join(plan.options.hosts)}
    chosen = ", ".join(f"{field} {value}" for field, value in options.items() if value)
    nodes = "1 node" if plan.nodes == 1 else f"{plan.nodes} nodes"
    times = f", up to {plan.options.allocations} times" if plan.options.allocations > 1 else ""
    return f"{nodes} for {span(60 * plan.minutes)}{f' ({chosen})' if chosen else ''}{times}"


def hours(node_hours: float) -> str:
    return "1 node-hour" if node_hours == 1 else f"{node_hours:.3g} node-hours"


def dry_run_text(plan: AllocationPlan | None, verdict: Verdict | None) -> str:
    if plan is None or verdict is None:
        return "No scheduler is asked for anything: the session would run on what this service has."
    if not verdict.is_asked:
        return f"The job would be {_size(plan)}; {hours(plan.node_hours)} at most. {verdict.words}."
    start = "no estimate of the start" if verdict.starts_at is None else f"estimated start {clock(verdict.starts_at)}"
    return (
        f"The scheduler would take the job: {_size(plan)}; {start}; {hours(plan.node_hours)} at most. "
        f"Its words: {verdict.words or 'none'}."
    )


def planned_data(plan: AllocationPlan | None, verdict: Verdict | None) -> dict[str, Any] | None:
    if plan is None or verdict is None:
        return None
    return {
        "nodes": plan.nodes,
        "minutes": plan.minutes,
        **msgspec.to_builtins(plan.options),
        "node_hours_at_most": round(plan.node_hours, 3),
        "estimated_start": verdict.starts_at,
        "scheduler_says": verdict.words,
    }


# --- of open sessions


def allocation_of(open_session: OpenSession) -> AllocationFacts | None:
    """The allocation of a session that has one, now or with its next task."""
    for backend in open_session.session.backends if open_session.config.needs_allocation else ():
        if (facts := backend.describe().get("allocation")) is not None:
            return msgspec.convert(facts, AllocationFacts)
    return None


def refuse_used_up(open_session: OpenSession) -> None:
    """Raise AllocationsUsedUp where the session can have no further job."""
    facts = allocation_of(open_session)
    if facts is not None and facts.left_minutes == 0:
        raise AllocationsUsedUp(used_up_text(facts.allocations, open_session.config.minutes or facts.minutes))


def allocation_data(facts: AllocationFacts | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    data = {**msgspec.to_builtins(facts), "node_hours": round(facts.node_s / 3600, 3)}
    left = {} if facts.left_s is None else {"left_s": round(facts.left_s)}
    return {key: value for key, value in (data | left).items() if key != "node_s"}


def allocation_sentence(facts: AllocationFacts) -> str:
    """As in "job 12 RUNNING on node1, node2 for 4 min, 6 min left; 0.13 node-hours used"."""
    return f"{allocation_text(facts)}; {hours(facts.node_s / 3600)} used"


def allocation_field(open_session: OpenSession) -> dict[str, str]:
    """The field of the page; empty for a session without nodes of its own."""
    facts = allocation_of(open_session)
    return {} if facts is None else {"allocation": allocation_sentence(facts)}


def utilization(facts: AllocationFacts, statistics: Statistics, slots: int) -> float | None:
    """The share of the slots' time, over all nodes that the session has had, in which functions and processes ran."""
    node_share = facts.node_s / facts.nodes
    busy_s = sum(busy["seconds"] for busy in statistics["busy"])
    return min(1.0, busy_s / (slots * node_share)) if slots and node_share > 0 else None


def nodes_text(open_session: OpenSession) -> str:
    """Which nodes the session has, for how long, and how they get free; empty where it has none."""
    facts = allocation_of(open_session)
    if facts is None or not facts.on:
        return ""
    left = f" for {span(facts.left_s)} more" if facts.left_s is not None else ""
    free = call_text("close_session", session=open_session.id)
    return f"session {open_session.id} has {limited_list(facts.on, _NODES_SHOWN)}{left}; {free} frees them"


def is_pending(facts: AllocationFacts | None) -> bool:
    return facts is not None and facts.state == _PENDING
