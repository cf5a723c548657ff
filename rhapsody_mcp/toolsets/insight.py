"""The tools that tell how a session goes and what this machine can do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.backends import BACKENDS
from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.backends.local_models import models_text, shipped_text
from rhapsody_mcp.backends.vllm.config import SHIPPED
from rhapsody_mcp.machine import Machine, Part, look
from rhapsody_mcp.runtime.session_registry import OpenSession, OpenSessions
from rhapsody_mcp.runtime.tasks import leaves
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.replies.base import Reply, reply
from rhapsody_mcp.toolsets.replies.statistics_report import SessionStatistics, figures_of, figures_text
from rhapsody_mcp.toolsets.sessions import SessionId
from rhapsody_mcp.toolsets.tooling.schemas import UNTOLD

__all__ = ["Insight"]

_LIMITS = [key for key in Settings.model_fields if key.startswith("max_")]
_POLICY = ["allow_source", "allowed_executables", "allowed_modules", "allowed_folders"]
_BUDGETS = ["budget_tasks", "budget_tokens"]
_TOLD_SETTINGS = {"default_model", "default_task_s", "wait_cap_s", "min_free_bytes", *_BUDGETS, *_LIMITS, *_POLICY}
"""What an agent must know of what the person decided."""


class BackendHere(Reply):
    """`missing` says what is not there, and how to get it."""

    name: str
    works: bool
    version: str | None = None
    runs: str
    missing: str | None = None


class System(Reply):
    host: Annotated[str, UNTOLD]
    system: Annotated[str, UNTOLD]
    python: Annotated[str, UNTOLD]
    cores: Annotated[int, UNTOLD]
    memory_gib: Annotated[float | None, UNTOLD] = None
    gpus: Annotated[list[str], UNTOLD]
    backends: Annotated[list[BackendHere], UNTOLD]
    mpi: Annotated[str, UNTOLD]
    settings: Annotated[dict[str, Any], UNTOLD]
    environment: Annotated[dict[str, Any], UNTOLD]


class Insight:
    def __init__(self, sessions: OpenSessions, settings: Settings) -> None:
        self._sessions, self._settings = sessions, settings

    async def get_statistics(
        self,
        session: SessionId,
        group: Annotated[str | None, Field(description='Only this group, e.g. "sweep".')] = None,
    ) -> Annotated[CallToolResult, SessionStatistics]:
        measured = self._sessions.get(session).session
        statistics = measured.get_statistics(group)
        replaced = len(leaves(measured.replaced))
        told = (session, group, statistics, replaced)
        return reply(figures_text(*told), figures_of(*told))

    async def describe_system(self) -> Annotated[CallToolResult, System]:
        data = _system(look(), self._settings, self._sessions.all())
        return reply(_system_text(data, self._settings), data)


def _system(machine: Machine, settings: Settings, sessions: Sequence[OpenSession]) -> System:
    return System(
        host=machine.host,
        system=machine.system,
        python=machine.python,
        cores=machine.cores,
        memory_gib=machine.memory_gib,
        gpus=list(machine.gpus),
        backends=_backends(machine),
        mpi=_mpi(machine),
        settings=settings.model_dump(mode="json", include=_TOLD_SETTINGS, exclude_none=True),
        environment=_environment(settings, sessions),
    )


def _environment(settings: Settings, sessions: Sequence[OpenSession]) -> dict[str, Any]:
    """What engines find: which variables of the server's own they lack, and what sessions gave them besides."""
    withheld = Environment(withheld=settings.withheld_variables)
    given = {opened.id: opened.wanted.environment for opened in sessions if opened.wanted.environment is not None}
    return {
        "withheld": sorted(name for name in os.environ if withheld.withholds(name)),
        "sessions": {id: {"variables": sorted(one.variables), "setup": list(one.setup)} for id, one in given.items()},
    }


def _backends(machine: Machine) -> list[BackendHere]:
    device = "the GPUs" if machine.gpus else "the CPU: small models only"
    return [
        _backend(name, registration.runs.format(device=device), machine.part(registration.needs))
        for name, registration in BACKENDS.items()
    ]


def _mpi(machine: Machine) -> str:
    if not machine.dragon.present:
        return "MPI jobs do not run here: they need Dragon"
    if not machine.pmi:
        return "MPI jobs do not run here: no PMIx or Cray PMI library was found; other jobs of many ranks run"
    return f"MPI jobs may run here, on dragon: {machine.pmi} is here, and the first one tries whether it works"


def _backend(name: str, runs: str, part: Part | None) -> BackendHere:
    """`part` is the program that it needs, if any."""
    if part is None:
        return BackendHere(name=name, works=True, runs=runs)
    missing = None if part.present else f"{part.name} is not installed. Get it with: {part.remedy}."
    return BackendHere(name=name, works=part.present, version=part.version or None, runs=runs, missing=missing)


def _system_text(data: System, settings: Settings) -> str:
    memory = f", {data.memory_gib:g} GiB memory" if data.memory_gib else ""
    gpus = ", ".join(data.gpus) or "no GPU"
    lines = [f"{data.host}: {data.system}, Python {data.python}, {data.cores} cores{memory}, {gpus}."]
    lines += [f"- {_headline(backend)}: {backend.missing or backend.runs}" for backend in data.backends]
    lines.append(f"- {data.mpi}.")
    told = shipped_text() if settings.default_model == SHIPPED else f"{settings.default_model}. {models_text()}"
    lines += [f"Default model: {told}", _asks_text(settings)]
    lines += [_limits_text(settings), *_policy_text(settings), *_environment_text(data.environment)]
    return "\n".join(lines)


def _headline(backend: BackendHere) -> str:
    """As in `dragon 0.15.1 works here`."""
    named = f"{backend.name} {backend.version}" if backend.version else backend.name
    return f"{named} {'works here' if backend.works else 'does not work here'}"


def _limits_text(settings: Settings) -> str:
    """As in `Limits (settings): max_sessions 32, ...`."""
    limits = ((key, getattr(settings, key)) for key in (*_LIMITS, "default_task_s", "min_free_bytes"))
    told = (f"{key} {_amount(key, value)}" for key, value in limits if value is not None)
    return f"Limits, by the keys of the server's settings: {', '.join(told)}."


def _amount(key: str, value: float) -> str:
    """As in `256 MiB` for bytes."""
    if not key.endswith("_bytes"):
        return f"{value:,.16g}"
    unit, size = next(((unit, size) for unit, size in _UNITS if value >= size), ("bytes", 1))
    return f"{value / size:.4g} {unit}"


_UNITS = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))


def _policy_text(settings: Settings) -> list[str]:
    told = [] if settings.allow_source else ["no functions as source text (allow_source)"]
    for key in _POLICY[1:]:
        if (allowed := getattr(settings, key)) is not None:
            told.append(f"{key}: {', '.join(map(str, allowed)) or 'none'}")
    return [f"Allowed here: {'; '.join(told)}."] if told else []


def _environment_text(environment: dict[str, Any]) -> list[str]:
    lines = []
    if names := environment["withheld"]:
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        lines.append(f"Variables of the server that tasks do not inherit (withheld_variables): {shown}.")
    for id, given in environment["sessions"].items():
        parts = {"variables": ", ".join(given["variables"]), "setup": "; ".join(given["setup"])}
        lines.append(f"Engines of {id} start with {', '.join(f'{key} {part}' for key, part in parts.items() if part)}.")
    return lines


_NAMES_SHOWN = 20


def _asks_text(settings: Settings) -> str:
    asks = {"tasks": settings.budget_tasks, "tokens of max_tokens": settings.budget_tokens}
    told = [f"{most} {what}" for what, most in asks.items() if most is not None]
    budget = f" Above {' or '.join(told)} in a session, submit_tasks asks the person." if told else ""
    return f"One wait_tasks waits {settings.wait_cap_s:g} s at most.{budget}"
