"""Asks the person before work is lost or a budget is exceeded, where the client can ask."""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple
from weakref import WeakKeyDictionary

from mcp.server.mcpserver import AcceptedElicitation, Context, Elicit, ElicitationResult
from pydantic import BaseModel, Field

from rhapsody_mcp.model.errors import NeedsForce, NotConfirmed
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import Task, name_of
from rhapsody_mcp.settings import Settings

__all__ = ["Answer", "Asking", "Confirm", "Desk", "Force", "Loss", "ask", "ask_about", "named_few", "refuse_unless"]

_NAMES_SHOWN = 3

Force = Annotated[bool, Field(description="true does not ask.")]


class Confirm(BaseModel):
    """What a person fills in; to accept it as it is means yes."""

    go_on: Annotated[bool, Field(title="Go on")] = True


Answer = ElicitationResult[Confirm]
Asking = Context[Any, Any]


class Loss(NamedTuple):
    """What a call would end, and the sentence that says so."""

    told: str
    uids: Set[str]


@dataclass(frozen=True)
class Desk:
    """What a question is about; every call of a server finds it in its lifespan context."""

    sessions: SessionRegistry
    settings: Settings
    asked: WeakKeyDictionary[OpenSession, dict[str, Loss]] = field(default_factory=WeakKeyDictionary)
    """The last question of each tool about a session."""

    @staticmethod
    def of(context: Asking) -> Desk:
        desk = context.request_context.lifespan_context
        assert isinstance(desk, Desk)
        return desk


def ask(told: str, context: Asking) -> Elicit[Confirm]:
    """A question whether to go on although `told`. Raises NeedsForce where the client cannot ask it."""
    if not _can_ask(context):
        raise NeedsForce(f"{told} This needs a person's agreement, and your client cannot ask for it.")
    return Elicit(f"{told} Go on?", Confirm)


def ask_about(loss: Loss, opened: OpenSession, tool: str, context: Asking) -> Elicit[Confirm] | Confirm:
    """A question whether to lose this, or the yes of one who loses nothing.

    From 2026-07-28 on an answer comes with a second call, and counts for the very words that were asked. So they
    stay as they were while no more would be lost than they say: tasks end while a person reads.
    """
    asked = Desk.of(context).asked.setdefault(opened, {})
    if context.input_responses and tool in asked and loss.uids <= asked[tool].uids:
        return ask(asked[tool].told, context)
    if not loss.uids:
        return Confirm()
    question = ask(loss.told, context)
    asked[tool] = loss
    return question


def refuse_unless(answer: Answer) -> None:
    """Raises NotConfirmed where the person did not agree."""
    if not isinstance(answer, AcceptedElicitation):
        said = "said no" if answer.action == "decline" else "gave no answer"
        raise NotConfirmed(f"the person was asked and {said}; nothing was changed.")
    if not answer.data.go_on:
        raise NotConfirmed("the person was asked and said no; nothing was changed.")


def named_few(tasks: Collection[Task]) -> str:
    """As in `train, fit-1, fit-2 and 9 more`."""
    names = [name_of(task) for task, _ in zip(tasks, range(_NAMES_SHOWN), strict=False)]
    return ", ".join(names) + (f" and {len(tasks) - len(names)} more" if len(tasks) > len(names) else "")


def _can_ask(context: Asking) -> bool:
    capabilities = context.client_capabilities
    asks = capabilities.elicitation if capabilities else None
    with_forms = asks is not None and (asks.form is not None or asks.url is None)
    return with_forms and (context.protocol_version == "2026-07-28" or context.session.can_send_request)
