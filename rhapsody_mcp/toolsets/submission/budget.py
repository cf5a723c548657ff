"""Asks the person before a submission exceeds the session's budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mcp.server.mcpserver import Elicit

from rhapsody_mcp.model.errors import InvalidTask, UnknownName
from rhapsody_mcp.runtime.dataflow.for_each_values import known_count
from rhapsody_mcp.runtime.dataflow.item_template import with_item
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.task_request import StandIn, TaskRequest
from rhapsody_mcp.runtime.tasks import Part
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.submission.again import planned_again, repeated_again, tokens_of
from rhapsody_mcp.toolsets.submission.prepared import check_tasks, prepare_tasks
from rhapsody_mcp.toolsets.submission.submit import repeated_submission
from rhapsody_mcp.toolsets.tooling.background import to_thread_if_large
from rhapsody_mcp.toolsets.tooling.confirmation import CallContext, Confirm, ServerState, ask

__all__ = ["Demand", "ask_to_exceed", "demand_of", "over_budget"]


class Demand(NamedTuple):
    """A number of tasks, and the most tokens of their answers; a prompt without a bound counts as 0 tokens."""

    tasks: int
    tokens: int

    def plus(self, other: Demand) -> Demand:
        return Demand(self.tasks + other.tasks, self.tokens + other.tokens)


def demand_of(requests: Iterable[TaskRequest], open_session: OpenSession | None = None) -> Demand:
    """The demand of a submission; a for_each over a result that is not known yet counts as one task."""
    total = Demand(0, 0)
    for request in requests:
        each = _known_count(request.for_each, open_session)
        items: Sequence[Any] = each if isinstance(each, list) else range(each) if isinstance(each, int) else [None]
        total = total.plus(Demand(len(items), _tokens(request, items)))
    return total


def _known_count(for_each: Any, open_session: OpenSession | None) -> Any:
    """The number of items in the place of a reference to a result that is there."""
    if open_session is None or not isinstance(for_each, dict) or not isinstance(for_each.get("ref"), str):
        return for_each
    try:
        source = Part(open_session.task(for_each["ref"]), for_each.get("path") or "")
    except UnknownName:  # it may be of the same call
        return for_each
    count = known_count(source)
    return for_each if count is None else count


def _tokens(request: TaskRequest, items: Sequence[Any]) -> int:
    """The most tokens of the answers; 0 where a result of another task will set the bound."""
    prompts = len(request.prompt) if isinstance(request.prompt, list) else 1
    if isinstance(request.max_tokens, dict) or isinstance(request.n, dict):
        return prompts * sum(_number(request.max_tokens, item) * (_number(request.n, item) or 1) for item in items)
    return prompts * len(items) * (request.max_tokens or 0) * (request.n or 1)


def _number(value: int | StandIn | None, item: Any) -> int:
    if isinstance(value, dict):
        try:
            value = with_item(value, item).get("literal")
        except InvalidTask:
            value = 0  # the submission will refuse the request
    return value if isinstance(value, int) else 0


def over_budget(demand: Demand, settings: Settings) -> list[str]:
    """A text for each number that is over budget."""
    limits = [
        ("tasks", demand.tasks, "budget_tasks", settings.budget_tasks),
        ("tokens of answers", demand.tokens, "budget_tokens", settings.budget_tokens),
    ]
    return [
        f"{count:,} {what}, and its budget is {most:,} ({key} in the server's settings)"
        for what, count, key, most in limits
        if most is not None and count > most
    ]


async def ask_to_exceed(
    session: str,
    tasks: list[TaskRequest] | None,
    retry: list[str] | None,
    dry_run: bool,
    idempotency_key: str | None,
    force: bool,
    context: CallContext,
) -> Elicit[Confirm] | Confirm:
    state = ServerState.of(context)
    open_session = state.sessions.get(session)
    if force or dry_run or not (tasks or retry):
        return Confirm()
    usage = open_session.session.usage
    demand = demand_of(tasks, open_session) if tasks else _demand_again(open_session, retry or [], idempotency_key)
    over = over_budget(Demand(usage.tasks, usage.tokens).plus(demand), state.settings)
    if not over or (tasks and repeated_submission(open_session, tasks, idempotency_key) is not None):
        return Confirm()
    question = f"This gives {session} {'; '.join(over)}."
    if not tasks:
        return ask(question, context)
    async with open_session.naming_lock:  # a person is not asked about tasks that will be refused
        prepared = await prepare_tasks(open_session, tasks)
        await to_thread_if_large(check_tasks, open_session, tasks, prepared)
    return ask(question, context)


def _demand_again(open_session: OpenSession, names: Sequence[str], idempotency_key: str | None) -> Demand:
    if repeated_again(open_session, names, idempotency_key) is not None:
        return Demand(0, 0)
    again = planned_again(open_session, names)
    return Demand(len(again), sum(map(tokens_of, again)))
