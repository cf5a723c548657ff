"""The tools that show the statistics of a session, and what this machine can do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

from mcp.types import CallToolResult
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.backends import BACKENDS
from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.backends.local_models import models_text, shipped_text
from rhapsody_mcp.backends.vllm.config import SHIPPED
from rhapsody_mcp.machine import Dependency, Machine, inspect_machine
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import leaves
from rhapsody_mcp.schedulers.detection import SchedulerDescription, describe_scheduler
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.allocations import (
    allocation_data,
    allocation_of,
    allocation_sentence,
    hours,
    utilization,
)
from rhapsody_mcp.toolsets.replies.base import Reply, reply
from rhapsody_mcp.toolsets.replies.formatting import NAMES_SHOWN, limited_list
from rhapsody_mcp.toolsets.replies.scheduler_report import scheduler_data, scheduler_text
from rhapsody_mcp.toolsets.replies.statistics_report import SessionStatistics, statistics_report, statistics_text
from rhapsody_mcp.toolsets.sessions import SessionId
from rhapsody_mcp.toolsets.tooling.schemas import TYPE_ONLY

__all__ = ["Insight"]

_LIMITS = [key for key in Settings.model_fields if key.startswith("max_")]
_POLICY = ["allow_source", "allowed_executables", "allowed_modules", "allowed_folders"]
_BUDGETS = ["budget_tasks", "budget_tokens", "budget_node_hours"]
_OTHERS = ["default_model", "default_profile", "default_task_s", "wait_cap_s", "min_free_bytes"]
_SHOWN_SETTINGS = {*_OTHERS, *_BUDGETS, *_LIMITS, *_POLICY}
"""The settings that an agent needs to know."""


class BackendStatus(Reply):
    """`missing` says what is not there, and how to get it."""

    name: str
    works: bool
    version: str | None = None
    runs: str
    missing: str | None = None


class SystemReport(Reply):
    host: Annotated[str, TYPE_ONLY]
    system: Annotated[str, TYPE_ONLY]
    python: Annotated[str, TYPE_ONLY]
    cores: Annotated[int, TYPE_ONLY]
    memory_gib: Annotated[float | None, TYPE_ONLY] = None
    gpus: Annotated[list[str], TYPE_ONLY]
    backends: Annotated[list[BackendStatus], TYPE_ONLY]
    mpi: Annotated[str, TYPE_ONLY]
    settings: Annotated[dict[str, Any], TYPE_ONLY]
    environment: Annotated[dict[str, Any], TYPE_ONLY]
    scheduler: SkipJsonSchema[dict[str, Any] | None] = None


class Insight:
    def __init__(self, sessions: SessionRegistry, settings: Settings) -> None:
        self._sessions, self._settings = sessions, settings

    async def get_statistics(
        self,
        session: SessionId,
        group: Annotated[str | None, Field(description='Only this group, e.g. "sweep".')] = None,
    ) -> Annotated[CallToolResult, SessionStatistics]:
        open_session = self._sessions.get(session)
        statistics = open_session.session.get_statistics(group)
        replaced = len(leaves(open_session.session.replaced))
        text = statistics_text(session, group, statistics, replaced)
        data = statistics_report(session, group, statistics, replaced)
        if (facts := allocation_of(open_session)) is None:
            return reply(text, data)
        backends = open_session.session.backends
        slots = max((backend.num_cores or backend.num_workers or 0 for backend in backends), default=0)
        share = utilization(facts, statistics, slots) if group is None else None
        used = f", of which tasks used {share:.0%} of {slots} cores" if share is not None else ""
        allocation = {**(allocation_data(facts) or {}), **({} if share is None else {"utilization": round(share, 4)})}
        text += f"\nAllocation: {allocation_sentence(facts)}{used}."
        return reply(text, data.model_copy(update={"allocation": allocation}))

    async def describe_system(self) -> Annotated[CallToolResult, SystemReport]:
        scheduler = await describe_scheduler()
        machine = inspect_machine()
        data = _system(machine, self._sessions.mpi.told(machine), self._settings, self._sessions.all(), scheduler)
        return reply(_system_text(data, self._settings, scheduler), data)


def _system(
    machine: Machine,
    mpi: str,
    settings: Settings,
    sessions: Sequence[OpenSession],
    scheduler: SchedulerDescription,
) -> SystemReport:
    return SystemReport(
        host=machine.host,
        system=machine.system,
        python=machine.python,
        cores=machine.cores,
        memory_gib=machine.memory_gib,
        gpus=list(machine.gpus),
        backends=_backends(machine),
        mpi=mpi,
        settings=settings.model_dump(mode="json", include=_SHOWN_SETTINGS, exclude_none=True),
        environment=_environment(settings, sessions),
        scheduler=scheduler_data(scheduler, settings),
    )


def _environment(settings: Settings, sessions: Sequence[OpenSession]) -> dict[str, Any]:
    """The variables of the server that engines do not inherit, and the environments that sessions asked for."""
    withheld = Environment(withheld=settings.withheld_variables)
    wanted = {one.id: one.config.environment for one in sessions if one.config.environment is not None}
    return {
        "withheld": sorted(name for name in os.environ if withheld.withholds(name)),
        "sessions": {id: {"variables": sorted(one.variables), "setup": list(one.setup)} for id, one in wanted.items()},
    }


def _backends(machine: Machine) -> list[BackendStatus]:
    device = "the GPUs" if machine.gpus else "the CPU: small models only"
    return [
        _backend(name, registration.runs.format(device=device), machine.dependency(registration.needs))
        for name, registration in BACKENDS.items()
    ]


def _backend(name: str, runs: str, part: Dependency | None) -> BackendStatus:
    """`part` is the program that the backend needs, if any."""
    if part is None:
        return BackendStatus(name=name, works=True, runs=runs)
    missing = None if part.present else f"{part.name} is not installed. Get it with: {part.remedy}."
    return BackendStatus(name=name, works=part.present, version=part.version or None, runs=runs, missing=missing)


def _system_text(data: SystemReport, settings: Settings, scheduler: SchedulerDescription) -> str:
    memory = f", {data.memory_gib:g} GiB memory" if data.memory_gib else ""
    gpus = ", ".join(data.gpus) or "no GPU"
    lines = [f"{data.host}: {data.system}, Python {data.python}, {data.cores} cores{memory}, {gpus}."]
    lines += [f"- {_headline(backend)}: {backend.missing or backend.runs}" for backend in data.backends]
    lines += [f"- {data.mpi}.", *scheduler_text(scheduler, settings)]
    model = shipped_text() if settings.default_model == SHIPPED else f"{settings.default_model}. {models_text()}"
    lines += [f"Default model: {model}", _bounds_text(settings)]
    lines.append("A person can watch sessions on a page: rhapsody-mcp dashboard.")
    lines += [_limits_text(settings), *_policy_text(settings), *_environment_text(data.environment)]
    return "\n".join(lines)


def _headline(backend: BackendStatus) -> str:
    """As in `dragon 0.15.1 works here`."""
    name = f"{backend.name} {backend.version}" if backend.version else backend.name
    return f"{name} {'works here' if backend.works else 'does not work here'}"


def _limits_text(settings: Settings) -> str:
    """As in `Limits (settings): max_sessions 32, ...`."""
    limits = ((key, getattr(settings, key)) for key in (*_LIMITS, "default_task_s", "min_free_bytes"))
    texts = (f"{key} {_amount(key, value)}" for key, value in limits if value is not None)
    return f"Limits, by the keys of the server's settings: {', '.join(texts)}."


def _amount(key: str, value: float) -> str:
    """As in `256 MiB` for bytes."""
    if not key.endswith("_bytes"):
        return f"{value:,.16g}"
    unit, size = next(((unit, size) for unit, size in _UNITS if value >= size), ("bytes", 1))
    return f"{value / size:.4g} {unit}"


_UNITS = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))


def _policy_text(settings: Settings) -> list[str]:
    rules = [] if settings.allow_source else ["no functions as source text (allow_source)"]
    for key in _POLICY[1:]:
        if (allowed := getattr(settings, key)) is not None:
            rules.append(f"{key}: {', '.join(map(str, allowed)) or 'none'}")
    return [f"Allowed here: {'; '.join(rules)}."] if rules else []


def _environment_text(environment: dict[str, Any]) -> list[str]:
    lines = []
    if names := environment["withheld"]:
        shown = limited_list(names, NAMES_SHOWN, ", ...")
        lines.append(f"Variables of the server that tasks do not inherit (withheld_variables): {shown}.")
    for id, own in environment["sessions"].items():
        parts = {"variables": ", ".join(own["variables"]), "setup": "; ".join(own["setup"])}
        lines.append(f"Engines of {id} start with {', '.join(f'{key} {part}' for key, part in parts.items() if part)}.")
    return lines


def _bounds_text(settings: Settings) -> str:
    budgets = {"tasks": settings.budget_tasks, "tokens of max_tokens": settings.budget_tokens}
    texts = [f"{most} {what}" for what, most in budgets.items() if most is not None]
    budget = f" Above {' or '.join(texts)} in a session, submit_tasks asks the person." if texts else ""
    nodes = settings.budget_node_hours
    allocations = "" if nodes is None else f" create_session asks the person above {hours(nodes)} of the open sessions."
    return f"One wait_tasks waits {settings.wait_cap_s:g} s at most.{budget}{allocations}"
