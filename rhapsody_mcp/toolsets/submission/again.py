"""Runs failed tasks again for `submit_tasks`: what that is, once for an idempotency key, and the reply."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence

from mcp.types import CallToolResult

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.session.again import is_outdated
from rhapsody_mcp.runtime.tasks import AITask, ForEach, Task, name_of, tasks_text
from rhapsody_mcp.toolsets.allocations import refuse_used_up
from rhapsody_mcp.toolsets.replies.base import count_states, reply
from rhapsody_mcp.toolsets.replies.formatting import call_text, counts_text, limited_list
from rhapsody_mcp.toolsets.submission.report import SubmissionReport, backends_text

__all__ = ["plan_again", "planned_again", "repeated_again", "run_again", "tokens_of"]

_NAMES_SHOWN = 10


async def run_again(open_session: OpenSession, names: Sequence[str], key: str | None) -> CallToolResult:
    """Run again what failed of these tasks; with the key of an earlier call, reply for the tasks of that call."""
    return await asyncio.shield(asyncio.ensure_future(_run_again(open_session, names, key)))


async def _run_again(open_session: OpenSession, names: Sequence[str], key: str | None) -> CallToolResult:
    async with open_session.naming_lock:
        if (repeated := repeated_again(open_session, names, key)) is not None:
            return repeated
        refuse_used_up(open_session)
        again = await open_session.retry(open_session.tasks(names), key or "", _digest(names))
    return _report(open_session, again, "Runs again")


def plan_again(open_session: OpenSession, names: Sequence[str]) -> CallToolResult:
    """The reply of a dry run. Raises what `run_again` raises."""
    refuse_used_up(open_session)
    what = "Dry run, nothing was submitted. Would run again"
    return _report(open_session, open_session.session.plan_retry(open_session.tasks(names)), what, is_plan=True)


def planned_again(open_session: OpenSession, names: Sequence[str]) -> list[Task]:
    return _singles(open_session.session.plan_retry(open_session.tasks(names)))


def tokens_of(task: Task) -> int:
    """The most tokens of the answers of a prompt, as a budget counts them."""
    if not isinstance(task, AITask) or not isinstance(task.max_tokens, int):
        return 0
    return task.max_tokens * (task.n if isinstance(task.n, int) else 1) * (len(task.prompt) if task.many else 1)


def repeated_again(open_session: OpenSession, names: Sequence[str], key: str | None) -> CallToolResult | None:
    """The reply for the tasks of an earlier call with this key; None where no call had the key.

    Raises InvalidRequest where the earlier call was another one.
    """
    if key is None or (earlier := open_session.submissions.get(key)) is None:
        return None
    if earlier.request_digest != _digest(names):
        raise InvalidRequest(f"idempotency_key {key!r} belongs to another call; repeat that one, or take a new key.")
    return _report(open_session, earlier.tasks, "Nothing was done now: an earlier call with this key ran again", True)


def _digest(names: Sequence[str]) -> bytes:
    return hashlib.sha256("\n".join(["retry", *names]).encode()).digest()


def _singles(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if not (isinstance(task, ForEach) and task.children)]


def _report(
    open_session: OpenSession,
    tasks: Sequence[Task],
    what: str,
    repeated: bool | None = None,
    *,
    is_plan: bool = False,
) -> CallToolResult:
    singles = _singles(tasks) or list(tasks)
    names = {task.name: task.uid for task in tasks if task.name and task.parent is None}
    data = SubmissionReport(
        session=open_session.id,
        submitted=len(singles),
        first=singles[0].uid,
        last=singles[-1].uid,
        names=dict(list(names.items())[:_NAMES_SHOWN]),
        counts=count_states(singles),
        backends=dict(Counter(task.backend or "" for task in singles)),
        repeated=repeated,
    )
    shown = limited_list([name_of(task) for task in singles], _NAMES_SHOWN)
    where = f"({backends_text(data.backends)}; {counts_text(data.counts)})"
    lines = [f"{what} {tasks_text(len(singles))}: {shown} {where}."]
    uids = {task.uid for task in tasks}
    others = (task for task in open_session.session.tasks if task.uid not in uids)
    if old := [name_of(task) for task in others if is_outdated(task, uids)]:
        names_of_old = limited_list(old, _NAMES_SHOWN)
        lines.append(f"Note: {names_of_old} ended with what there was before; retry takes such tasks too.")
    next_step = "the same call without dry_run" if is_plan else call_text("wait_tasks", session=open_session.id)
    return reply("\n".join([*lines, f"Next: {next_step}."]), data)
