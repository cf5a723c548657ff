"""Asks the person before work is lost or a budget is exceeded, where the client can ask."""

from __future__ import annotations

from collections.abc import Sequence, Set
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
from rhapsody_mcp.toolsets.replies.formatting import limited_list

__all__ = [
    "Answer",
    "CallContext",
    "Confirm",
    "Force",
    "Loss",
    "ServerState",
    "ask",
    "ask_before_loss",
    "require_agreement",
    "task_names",
]

_NAMES_IN_QUESTION = 3

Force = Annotated[bool, Field(description="true does not ask.")]


class Confirm(BaseModel):
    """The form that a person fills in; a form that is accepted unchanged means yes."""

    go_on: Annotated[bool, Field(title="Go on")] = True


Answer = ElicitationResult[Confirm]
CallContext = Context[Any, Any]


class Loss(NamedTuple):
    """The tasks that a call would end, by uid, and the sentence that tells the person so."""

    sentence: str
    uids: Set[str]


@dataclass(frozen=True)
class ServerState:
    """The lifespan context of a server, which every call finds in its context."""

    sessions: SessionRegistry
    settings: Settings
    questions: WeakKeyDictionary[OpenSession, dict[str, Loss]] = field(default_factory=WeakKeyDictionary)
    """The last question about each session, by tool."""

    @staticmethod
    def of(context: CallContext) -> ServerState:
        state = context.request_context.lifespan_context
        assert isinstance(state, ServerState)
        return state


def ask(sentence: str, context: CallContext) -> Elicit[Confirm]:
    """The question whether to go on. Raises NeedsForce where the client cannot ask a person."""
    if not _can_ask(context):
        raise NeedsForce(f"{sentence} This needs a person's agreement, and your client cannot ask for it.")
    return Elicit(f"{sentence} Go on?", Confirm)


def ask_before_loss(
    loss: Loss, open_session: OpenSession, tool: str, context: CallContext
) -> Elicit[Confirm] | Confirm:
    """The question whether to lose these tasks, or a yes where no task is lost.

    From protocol 2026-07-28 on, the answer comes with a second call and is valid only for the same sentence. Tasks end
    while a person reads, so the second call repeats the first sentence unless more tasks would be lost now.
    """
    questions = ServerState.of(context).questions.setdefault(open_session, {})
    if context.input_responses and tool in questions and loss.uids <= questions[tool].uids:
        return ask(questions[tool].sentence, context)
    if not loss.uids:
        return Confirm()
    question = ask(loss.sentence, context)
    questions[tool] = loss
    return question


def require_agreement(answer: Answer) -> None:
    """Raises NotConfirmed where the person did not agree."""
    if not isinstance(answer, AcceptedElicitation):
        said = "said no" if answer.action == "decline" else "gave no answer"
        raise NotConfirmed(f"the person was asked and {said}; nothing was changed.")
    if not answer.data.go_on:
        raise NotConfirmed("the person was asked and said no; nothing was changed.")


def task_names(tasks: Sequence[Task]) -> str:
    """The names in a question, as in `train, fit-1, fit-2 and 9 more`."""
    return limited_list([name_of(task) for task in tasks], _NAMES_IN_QUESTION)


def _can_ask(context: CallContext) -> bool:
    capabilities = context.client_capabilities
    elicitation = capabilities.elicitation if capabilities else None
    with_forms = elicitation is not None and (elicitation.form is not None or elicitation.url is None)
    return with_forms and (context.protocol_version == "2026-07-28" or context.session.can_send_request)
