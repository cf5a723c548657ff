"""The reply of a dry run: what would run where and after what, and what does not fit this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcp.types import CallToolResult

from rhapsody_mcp.machine import Machine
from rhapsody_mcp.runtime.dry_run import PlannedTask, plan_tasks, unknown_nodes, unmet_needs
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.request_batch import make_tasks
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.tasks import name_of, tasks_text
from rhapsody_mcp.schedulers.options import SchedulerOptions
from rhapsody_mcp.toolsets.replies.base import reply
from rhapsody_mcp.toolsets.submission.prepared import check_tasks
from rhapsody_mcp.toolsets.submission.report import SubmissionReport, backends_text, report_fields
from rhapsody_mcp.toolsets.submission.suspicious_texts import suspicious_texts

__all__ = ["plan"]

_STEPS_SHOWN = 30
_FITS = "Everything fits this machine."
_FITS_NODES = "Nothing is missing on this machine; what the nodes have is seen when the job runs."


def plan(open_session: OpenSession, requests: Sequence[TaskRequest], machine: Machine) -> CallToolResult:
    """Raises what the submission of these requests would raise."""
    tasks = make_tasks(requests, open_session)
    check_tasks(open_session, requests, tasks)
    config = open_session.config
    if config.needs_allocation:
        machine = unknown_nodes(machine, (config.scheduler or SchedulerOptions()).gpus_per_node)
    steps = plan_tasks(tasks, machine, open_session.session.software)
    problems = [
        f"{name_of(task)}: {wrong}"
        for task in tasks
        for wrong in unmet_needs(task, machine, config.folder, open_session.session.software)
    ]
    problems += suspicious_texts(requests, open_session, tasks)
    data = SubmissionReport(
        **report_fields(open_session, tasks) | {"submitted": 0, "counts": {}},
        graph=[_row(step) for step in steps[:_STEPS_SHOWN]],
        problems=problems[:_STEPS_SHOWN],
    )
    return reply(_text(data, steps, problems, _FITS_NODES if config.needs_allocation else _FITS), data)


def _row(step: PlannedTask) -> dict[str, Any]:
    row = {"task": name_of(step.task), "runs_as": step.runs_as, "level": step.level}
    return row | ({"waits_for": list(step.after)} if step.after else {})


def _text(data: SubmissionReport, steps: Sequence[PlannedTask], problems: Sequence[str], fits: str) -> str:
    deepest = max(step.level for step in steps)
    levels = "1 level" if deepest == 1 else f"{deepest} levels"
    where = backends_text(data.backends)
    lines = [f"Dry run, nothing was submitted: {tasks_text(len(steps))} in {levels} ({where})."]
    for step in steps[:_STEPS_SHOWN]:
        after = f", after {', '.join(step.after)}" if step.after else ""
        lines.append(f"- {name_of(step.task)}: {step.runs_as}{after}")
    if len(steps) > _STEPS_SHOWN:
        lines.append(f"... and {len(steps) - _STEPS_SHOWN} more.")
    lines += [f"Does not fit: {problem}" for problem in problems[:_STEPS_SHOWN]] or [fits]
    lines.append(f"Next: {'correct what does not fit, or ' if problems else ''}the same call without dry_run.")
    return "\n".join(lines)
