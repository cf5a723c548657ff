"""What a session has been given to do, and the question before it is given more than its budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mcp.server.mcpserver import Elicit

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.dataflow.item_template import with_item
from rhapsody_mcp.runtime.requests.task_request import StandIn, TaskRequest
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.submission.submit import check, submitted_before
from rhapsody_mcp.toolsets.tooling.confirmation import Asking, Confirm, Desk, ask

__all__ = ["Load", "ask_to_exceed", "asked_for", "excess"]


class Load(NamedTuple):
    """Tasks, and the most tokens that their prompts may be answered with where they say it."""

    tasks: int
    tokens: int

    def and_(self, other: Load) -> Load:
        return Load(self.tasks + other.tasks, self.tokens + other.tokens)


def asked_for(requests: Iterable[TaskRequest]) -> Load:
    """What a submission adds; a for_each over a result that is not known yet counts as one task."""
    load = Load(0, 0)
    for request in requests:
        each = request.for_each
        items: Sequence[Any] = each if isinstance(each, list) else range(each) if isinstance(each, int) else [None]
        load = load.and_(Load(len(items), _tokens(request, items)))
    return load


def _tokens(request: TaskRequest, items: Sequence[Any]) -> int:
    """The most that its answers may have; none of what an earlier result is to say."""
    prompts = len(request.prompt) if isinstance(request.prompt, list) else 1
    if isinstance(request.max_tokens, dict) or isinstance(request.n, dict):
        return prompts * sum(_number(request.max_tokens, item) * (_number(request.n, item) or 1) for item in items)
    return prompts * len(items) * (request.max_tokens or 0) * (request.n or 1)


def _number(asked: int | StandIn | None, item: Any) -> int:
    if isinstance(asked, dict):
        try:
            asked = with_item(asked, item).get("literal")
        except InvalidTask:
            asked = 0  # which its submission will refuse
    return asked if isinstance(asked, int) else 0


def excess(load: Load, settings: Settings) -> list[str]:
    """What of the load is over budget, in words."""
    limits = [
        ("tasks", load.tasks, "budget_tasks", settings.budget_tasks),
        ("tokens of answers", load.tokens, "budget_tokens", settings.budget_tokens),
    ]
    return [
        f"{count:,} {what}, and its budget is {most:,} ({key} in the server's settings)"
        for what, count, key, most in limits
        if most is not None and count > most
    ]


async def ask_to_exceed(
    session: str, tasks: list[TaskRequest], dry_run: bool, idempotency_key: str | None, force: bool, context: Asking
) -> Elicit[Confirm] | Confirm:
    desk = Desk.of(context)
    opened = desk.sessions.get(session)
    if force or dry_run:
        return Confirm()
    usage = opened.session.usage
    over = excess(Load(usage.tasks, usage.tokens).and_(asked_for(tasks)), desk.settings)
    if not over or submitted_before(opened, tasks, idempotency_key) is not None:
        return Confirm()
    check(opened, tasks)  # what will be refused is not asked about
    return ask(f"This gives {session} {'; '.join(over)}.", context)
