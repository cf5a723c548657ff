"""The tools that tell how a session goes and what this machine can do."""

from __future__ import annotations

from typing import Annotated

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.machine import Machine, Part, look
from rhapsody_mcp.model.statistics import Statistics
from rhapsody_mcp.runtime.open_sessions import OpenSessions
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.replies import Reply, counts_text, duration, reply
from rhapsody_mcp.toolsets.sessions import SessionId

__all__ = ["Insight"]


class SessionStatistics(Reply):
    session: str
    total_tasks: int
    counts: Annotated[dict[str, int], Field(description="Tasks by state.")]
    avg_total_s: Annotated[float, Field(description="Over ended tasks; queue plus execution.")]
    avg_queue_s: float
    avg_execution_s: float


class BackendHere(Reply):
    name: str
    works: bool
    runs: Annotated[str, Field(description="What it runs, and how.")]
    missing: Annotated[str | None, Field(description="What is not there, and how to get it.")] = None


class System(Reply):
    host: str
    system: str
    python: str
    cores: int
    memory_gib: float | None = None
    gpus: list[str]
    dragon: Annotated[str | None, Field(description="Version, where it is installed.")] = None
    vllm: Annotated[str | None, Field(description="Version, where it is installed.")] = None
    backends: list[BackendHere]
    mpi: str
    default_model: str
    wait_cap_s: float


class Insight:
    def __init__(self, sessions: OpenSessions, settings: Settings) -> None:
        self._sessions, self._settings = sessions, settings

    async def get_statistics(self, session: SessionId) -> Annotated[CallToolResult, SessionStatistics]:
        data = _statistics(session, self._sessions.get(session).session.get_statistics())
        return reply(_statistics_text(data), data)

    async def describe_system(self) -> Annotated[CallToolResult, System]:
        data = _system(look(), self._settings)
        return reply(_system_text(data), data)


def _statistics(session: str, statistics: Statistics) -> SessionStatistics:
    summary = statistics["summary"]
    return SessionStatistics(
        session=session,
        total_tasks=summary["total_tasks"],
        counts=statistics["counts"],
        avg_total_s=summary["avg_total"],
        avg_queue_s=summary["avg_queue"],
        avg_execution_s=summary["avg_execution"],
    )


def _statistics_text(data: SessionStatistics) -> str:
    return (
        f"{data.session}: {data.total_tasks} tasks ({counts_text(data.counts)}). Averages of the ended ones: total "
        f"{duration(data.avg_total_s)} = queue {duration(data.avg_queue_s)} + execution "
        f"{duration(data.avg_execution_s)}."
    )


def _system(machine: Machine, settings: Settings) -> System:
    return System(
        host=machine.host,
        system=machine.system,
        python=machine.python,
        cores=machine.cores,
        memory_gib=machine.memory_gib,
        gpus=list(machine.gpus),
        dragon=machine.dragon.version or None,
        vllm=machine.vllm.version or None,
        backends=_backends(machine),
        mpi=_mpi(machine),
        default_model=settings.default_model,
        wait_cap_s=settings.wait_cap_s,
    )


def _backends(machine: Machine) -> list[BackendHere]:
    compute = "functions and executables, as workers, single processes and jobs of many ranks"
    served = "the GPUs" if machine.gpus else "the CPU: small models only"
    return [
        _backend("dragon", f"{compute}, placed by Dragon", machine.dragon),
        BackendHere(name="local", works=True, runs=f"{compute}, as processes of this machine; no Dragon needed"),
        _backend("vllm", f"prompts, with a vLLM server that the session starts on {served}", machine.vllm),
        BackendHere(name="endpoint", works=True, runs="prompts, with an OpenAI-compatible server at endpoint_url"),
    ]


def _mpi(machine: Machine) -> str:
    if not machine.dragon.present:
        return "MPI jobs do not run here: they need Dragon"
    if not machine.pmi:
        return "MPI jobs do not run here: no PMIx or Cray PMI library was found; other jobs of many ranks run"
    return f"MPI jobs may run here, on dragon: {machine.pmi} is here, and the first one tries whether it works"


def _backend(name: str, runs: str, part: Part) -> BackendHere:
    missing = None if part.present else f"{part.name} is not installed. Get it with: {part.remedy}."
    return BackendHere(name=name, works=part.present, runs=runs, missing=missing)


def _system_text(data: System) -> str:
    memory = f", {data.memory_gib:g} GiB memory" if data.memory_gib else ""
    gpus = ", ".join(data.gpus) or "no GPU"
    lines = [f"{data.host}: {data.system}, Python {data.python}, {data.cores} cores{memory}, {gpus}."]
    lines += [f"- {backend.name} {_state(backend)}: {backend.missing or backend.runs}" for backend in data.backends]
    lines.append(f"- {data.mpi}.")
    lines.append(f"Default model: {data.default_model}. One wait_tasks waits {data.wait_cap_s:g} s at most.")
    return "\n".join(lines)


def _state(backend: BackendHere) -> str:
    return "works here" if backend.works else "does not work here"
