"""Completes session ids and task names in arguments of prompts and resource templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mcp import MCPError
from mcp.server import ServerRequestContext
from mcp.server.mcpserver import MCPServer
from mcp.types import (
    INVALID_PARAMS,
    CompleteRequestParams,
    CompleteResult,
    Completion,
    PromptReference,
    ResourceTemplateReference,
)

from rhapsody_mcp.cards import PromptText
from rhapsody_mcp.model.errors import RhapsodyError, UnknownName
from rhapsody_mcp.protocol.resources import TEMPLATES
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import leaves

__all__ = ["Completions"]

_MAX_VALUES = 100
"""The protocol's limit for one reply."""


class Completions:
    def __init__(self, sessions: SessionRegistry, prompts: Sequence[PromptText]) -> None:
        self._sessions = sessions
        self._arguments = {prompt.name: [argument.name for argument in prompt.arguments] for prompt in prompts}

    def serve(self, server: MCPServer[Any]) -> None:
        low_level = server._lowlevel_server  # MCPServer's own decorator has no types
        low_level.add_request_handler("completion/complete", CompleteRequestParams, self._on_complete)

    async def _on_complete(self, _: ServerRequestContext[Any, Any], params: CompleteRequestParams) -> CompleteResult:
        try:
            self._check(params.ref, params.argument.name)
        except UnknownName as error:
            raise MCPError(INVALID_PARAMS, str(error)) from error
        others = (params.context and params.context.arguments) or {}
        return CompleteResult(completion=_completion(self._names(params.argument.name, others), params.argument.value))

    def _check(self, ref: PromptReference | ResourceTemplateReference, argument: str) -> None:
        """Raises UnknownName for an unknown prompt, template or argument."""
        if isinstance(ref, PromptReference):
            kind, name, known = "prompt", ref.name, self._arguments
        else:
            variables = {uri: list(template.variable_names) for uri, template in TEMPLATES.items()}
            kind, name, known = "resource template", ref.uri, variables
        if name not in known:
            raise UnknownName(kind, name, known)
        if argument not in known[name]:
            raise UnknownName("argument", argument, known[name])

    def _names(self, argument: str, others: Mapping[str, str]) -> list[str]:
        """The valid values of `session` and `task`; none for other arguments, which are free text."""
        if argument == "session":
            return [opened.id for opened in self._sessions.all()]
        return self._task_names(others) if argument == "task" else []

    def _task_names(self, arguments: Mapping[str, str]) -> list[str]:
        opened = self._session(arguments)
        if opened is None:
            return []
        tasks = opened.session.tasks
        with_children = [*tasks, *(child for child in leaves(tasks) if child.parent is not None)]
        return [*(task.name for task in with_children if task.name), *(task.uid for task in with_children)]

    def _session(self, arguments: Mapping[str, str]) -> OpenSession | None:
        """The session that the arguments name, or the only open one."""
        if "session" not in arguments:
            return self._sessions.all()[0] if len(self._sessions.all()) == 1 else None
        try:
            return self._sessions.get(arguments["session"])
        except RhapsodyError:
            return None


def _completion(names: Iterable[str], typed: str) -> Completion:
    """The names that begin with the typed text, then those that contain it."""
    part = typed.lower()
    matches = [name for name in dict.fromkeys(names) if part in name.lower()]
    matches.sort(key=lambda name: not name.lower().startswith(part))
    return Completion(values=matches[:_MAX_VALUES], total=len(matches), has_more=len(matches) > _MAX_VALUES)
