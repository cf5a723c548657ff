"""The tools that open, list, export and close sessions."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from typing import Annotated, Any

from mcp.server.mcpserver import Elicit, Resolve
from mcp.types import CallToolResult
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.backends.environment import Environment, read_environment
from rhapsody_mcp.backends.local_models import shipped_text
from rhapsody_mcp.backends.vllm.config import Device
from rhapsody_mcp.dashboard.archive import keep_report, write_whole
from rhapsody_mcp.dashboard.report import write_report_in_steps
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.errors import InvalidRequest, InvalidSettings
from rhapsody_mcp.model.specs import Software
from rhapsody_mcp.runtime.allocation_plan import AllocationPlan, ask_scheduler, plan_allocation
from rhapsody_mcp.runtime.backend_factory import BackendName, SessionConfig, open_backends, try_environment
from rhapsody_mcp.runtime.call_context import current_folder
from rhapsody_mcp.runtime.export.export import export
from rhapsody_mcp.runtime.export.script import Script
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.process_layout import read_software
from rhapsody_mcp.runtime.requests.field_types import Name
from rhapsody_mcp.runtime.requests.task_request import Env
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import Task, leaves, tasks_text
from rhapsody_mcp.schedulers.base import Verdict
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.allocations import (
    allocation_data,
    allocation_field,
    allocation_of,
    allocation_sentence,
    ask_for_node_hours,
    dry_run_text,
    hours,
    plan_text,
    planned_data,
)
from rhapsody_mcp.toolsets.replies.base import Reply, reply
from rhapsody_mcp.toolsets.replies.formatting import counts_text
from rhapsody_mcp.toolsets.tooling.confirmation import (
    Answer,
    CallContext,
    Confirm,
    Force,
    Loss,
    ServerState,
    ask_before_loss,
    require_agreement,
    task_names,
)
from rhapsody_mcp.toolsets.tooling.deferred import defer
from rhapsody_mcp.toolsets.tooling.schemas import TYPE_ONLY

__all__ = ["SessionId", "Sessions", "session_row"]

_HEAD_BYTES = 2048
SessionId = Annotated[str, Field(description='Its id, e.g. "session-1".')]


class SessionEnvironment(BaseModel):
    """`setup` are lines for a login shell of bash, which runs before an engine starts. The others are for tasks that
    name none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variables: Env | None = None
    setup: tuple[str, ...] | None = None
    python: str | None = None
    packages: list[str] | None = None
    container: str | None = None

    @property
    def software(self) -> Software:
        return read_software({"python": self.python, "packages": self.packages, "container": self.container})

    def read(self) -> Environment:
        try:
            variables = {name: value for name, value in (self.variables or {}).items() if value is not None}
            return read_environment({"variables": variables, "setup": self.setup or ()})
        except InvalidSettings as error:
            raise InvalidRequest(str(error)) from error


Setup = Annotated[SessionEnvironment, WithJsonSchema({"type": "object"})]
Options = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]


class BackendRow(Reply):
    name: str
    runs: list[str]


class CreatedSession(Reply):
    session: str
    backends: Annotated[list[BackendRow], TYPE_ONLY]
    allocation: SkipJsonSchema[dict[str, Any] | None] = None


class SessionRow(Reply):
    session: str
    backends: list[str]
    counts: dict[str, int]
    allocation: SkipJsonSchema[dict[str, Any] | None] = None


class SessionList(Reply):
    sessions: Annotated[list[SessionRow], TYPE_ONLY]


class CloseReport(Reply):
    session: str
    counts: Annotated[dict[str, int], TYPE_ONLY]
    canceled: int
    node_hours: float | None = None


class ExportReport(Reply):
    script: str
    provenance: str
    report: str


async def ask_to_close(session: str, force: bool, context: CallContext) -> Elicit[Confirm] | Confirm:
    open_session = ServerState.of(context).sessions.get(session)
    if force:
        return Confirm()
    running = _open_tasks(open_session)
    sentence = (
        f"This closes {session}, cancels {tasks_text(len(running))} of it that "
        f"{'has' if len(running) == 1 else 'have'} not ended ({task_names(running)}), and deletes all its results."
    )
    return ask_before_loss(Loss(sentence, {task.uid for task in running}), open_session, "close_session", context)


def _open_tasks(open_session: OpenSession) -> list[Task]:
    return [task for task in leaves(open_session.session.tasks) if not task.state.final]


class Sessions:
    def __init__(self, sessions: SessionRegistry, settings: Settings) -> None:
        self._sessions, self._settings = sessions, settings

    async def create_session(
        self,
        name: Annotated[Name | None, Field(description='Its id; default is "session-1", and so on.')] = None,
        backends: Annotated[
            list[BackendName] | None,
            Field(min_length=1, description='What runs its tasks, e.g. ["dragon", "vllm"].'),
        ] = None,
        num_workers: Annotated[
            int | None, Field(ge=1, description="Workers for functions; default: one a core.")
        ] = None,
        model: Annotated[
            str | None,
            Field(description='For vllm: a folder, a hub name, e.g. "Qwen/Qwen2.5-0.5B-Instruct", or "shipped".'),
        ] = None,
        device: Annotated[Device | None, Field(description="For vllm; default: a GPU if any.")] = None,
        config_file: Annotated[
            str | None, Field(description='YAML of the vllm server, e.g. "/home/me/config.yaml".')
        ] = None,
        endpoint_url: Annotated[
            str | None,
            Field(description='OpenAI-compatible, e.g. "http://127.0.0.1:8000/v1".'),
        ] = None,
        endpoint_model: Annotated[str | None, Field(description="A model that it serves.")] = None,
        environment: Annotated[
            Setup | None,
            Field(
                description="Of its tasks: setup (in bash -l), python, packages, container, variables, e.g. "
                '{"setup": ["module load gcc"], "variables": {"A": "1"}}.'
            ),
        ] = None,
        nodes: Annotated[int | None, Field(ge=1, description="Nodes of a job, for its tasks.")] = None,
        minutes: Annotated[int | None, Field(ge=1, description="Time limit of the job; default 60.")] = None,
        scheduler: Annotated[
            Options | None,
            Field(description='partition, gpus_per_node, setup, hosts, ..., e.g. {"account": "m1"}.'),
        ] = None,
        dry_run: Annotated[bool, Field(description="Only ask the scheduler.")] = False,
        force: Force = False,
        *,
        answer: Annotated[Answer, Resolve(ask_for_node_hours)],
    ) -> Annotated[CallToolResult, CreatedSession]:
        require_agreement(answer)
        plan = plan_allocation(nodes, minutes, scheduler, self._settings)
        session_config = SessionConfig(
            backends=tuple(backends or ()),
            num_workers=num_workers,
            model=_full_path(model),
            device=device,
            config_file=_full_path(config_file),
            endpoint_url=endpoint_url,
            endpoint_model=endpoint_model,
            environment=None if environment is None else environment.read(),
            nodes=nodes if plan is None else plan.nodes,
            minutes=None if plan is None else plan.minutes,
            scheduler=None if plan is None else plan.options,
            folder=current_folder.get(),
            software=Software() if environment is None else environment.software,
        )
        await try_environment(session_config, self._settings)
        verdict = None if plan is None else await ask_scheduler(plan)
        if dry_run:
            rows = [_backend_row(backend) for backend in open_backends(session_config, self._settings)]
            data = CreatedSession(session="", backends=rows, allocation=planned_data(plan, verdict))
            return reply(_dry_run_text(rows, plan, verdict), data)
        open_session = await self._sessions.open(session_config, name)
        rows = [_backend_row(backend) for backend in open_session.session.backends]
        data = CreatedSession(session=open_session.id, backends=rows, allocation=planned_data(plan, verdict))
        return reply(self._created_text(open_session, rows, plan), data)

    def _created_text(self, open_session: OpenSession, rows: list[BackendRow], plan: AllocationPlan | None) -> str:
        idle = self._settings.engine_idle_s
        stop = f"; one that has had no task for {idle:g} s stops until the next (engine_idle_s)" if idle else ""
        lines = [f"{open_session.id} is open. Engines start with the first task that needs them{stop}."]
        lines += [f"- {plan_text(plan)}"] if plan is not None else []
        lines += [f"- {row.name} runs {', '.join(row.runs)} tasks" for row in rows]
        shipped = (backend.name for backend in open_session.session.backends if backend.serves_shipped_model)
        lines += [f"- {name} serves {shipped_text()}" for name in shipped]
        if not any("prompt" in row.runs for row in rows):
            lines.append("- prompts are refused: no backend of this session answers them (see describe_system)")
        return "\n".join([*lines, f'Next: submit_tasks(session="{open_session.id}", tasks=[...]).'])

    async def list_sessions(self) -> Annotated[CallToolResult, SessionList]:
        rows = [session_row(open_session) for open_session in self._sessions.all()]
        lines = [
            f"{row.session} ({', '.join(row.backends)}): {counts_text(row.counts)}{_allocation_text(open_session)}"
            for row, open_session in zip(rows, self._sessions.all(), strict=True)
        ]
        return reply("\n".join(lines) or "No session is open: call create_session.", SessionList(sessions=rows))

    async def export_session(
        self,
        session: SessionId,
        folder: Annotated[str | None, Field(description='Where to, e.g. "/home/me/runs".')] = None,
    ) -> Annotated[CallToolResult, ExportReport]:
        opened = self._sessions.get(session)
        exported = await export(opened, self._settings, self._sessions.state_folder, folder)
        page = exported.script_file.with_suffix(".html")
        view = SessionView(opened.session, opened.id)
        text = await write_report_in_steps(view, allocation_field(opened))
        await asyncio.to_thread(write_whole, page, text.encode())
        files = {"script": exported.script_file, "provenance": exported.provenance_file, "report": page}
        data = ExportReport(**{name: str(file) for name, file in files.items()})
        return reply(_exported_text(data, exported.script), data)

    async def close_session(
        self, session: SessionId, force: Force = False, *, answer: Annotated[Answer, Resolve(ask_to_close)]
    ) -> Annotated[CallToolResult, CloseReport]:
        require_agreement(answer)
        running = _open_tasks(self._sessions.get(session))
        if running:
            defer()
        closed = await self._sessions.close(session)
        counts = closed.session.get_statistics()["counts"]
        facts = allocation_of(closed)
        used = None if facts is None else round(facts.node_s / 3600, 3)
        text = f"{session} is closed and nothing of it is running: {counts_text(counts)}. Its results are deleted."
        text += "" if used is None else f" It used {hours(used)}."
        text += await _kept_report_text(closed, self._sessions, self._settings)
        return reply(text, CloseReport(session=session, counts=counts, canceled=len(running), node_hours=used))


async def _kept_report_text(closed: OpenSession, sessions: SessionRegistry, settings: Settings) -> str:
    """Keep the report of a closed session where sessions are kept; a sentence that says so, or why it failed."""
    if sessions.ledger is None or not settings.keep_reports_days or not closed.session.task_count:
        return ""
    view = SessionView(closed.session, closed.id)
    try:
        await asyncio.to_thread(keep_report, sessions.state_folder, view, allocation_field(closed))
    except OSError as error:
        return f" No report of it could be kept: {error.strerror or error}."
    return f" A report of it is kept: rhapsody-mcp report {closed.id} -o FILE.html."


def _dry_run_text(rows: list[BackendRow], plan: AllocationPlan | None, verdict: Verdict | None) -> str:
    lines = [f"Nothing was opened. {dry_run_text(plan, verdict)}"]
    lines += [f"- {row.name} would run {', '.join(row.runs)} tasks" for row in rows]
    return "\n".join([*lines, "Next: the same call without dry_run."])


def _allocation_text(open_session: OpenSession) -> str:
    facts = allocation_of(open_session)
    return "" if facts is None else f"; {allocation_sentence(facts)}"


def _beginning(script: str) -> str:
    """The first lines of the script, as many as a reply has room for."""
    shown = script.encode()[:_HEAD_BYTES].decode("utf-8", "ignore")
    return script if shown == script else shown[: shown.rfind("\n") + 1] or shown


def _exported_text(data: ExportReport, script: Script) -> str:
    head = _beginning(script.text)
    begins = "" if head == script.text else " begins"
    left_out = {
        "were canceled": script.left_out,
        "others replaced": script.replaced,
        "no code can say": script.unwritable,
    }
    missing = ", ".join(f"{count} that {why}" for why, count in left_out.items() if count)
    return (
        f"{data.script} ({len(script.text.encode())} bytes) repeats {tasks_text(script.tasks)}"
        f"{f'; not in it: {missing}' if missing else ''}.\n"
        f"Run it with: {shlex.join([sys.executable, data.script])}\n"
        f"{data.provenance}: versions, machine, and for each task its times, state and digest of its result.\n"
        f"{data.report}: a page for people, which a browser opens.\n"
        f"--- the script{begins} ---\n{head}"
    )


def _backend_row(backend: Backend) -> BackendRow:
    return BackendRow(name=backend.name, runs=sorted(backend.kinds))


def session_row(open_session: OpenSession) -> SessionRow:
    return SessionRow(
        session=open_session.id,
        backends=[backend.name for backend in open_session.session.backends],
        counts=open_session.session.counts,
        allocation=allocation_data(allocation_of(open_session)),
    )


def _full_path(name: str | None) -> str | None:
    """The full path of a file that the name leads to from the caller's folder; the name itself where there is none."""
    path = os.path.join(current_folder.get(), os.path.expanduser(name or ""))
    return path if name and current_folder.get() and os.path.exists(path) else name
