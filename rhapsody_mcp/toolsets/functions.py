"""The tool that registers functions under a name."""

from __future__ import annotations

from time import monotonic
from typing import Annotated

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.runtime.functions import RegisteredFunction
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.toolsets.replies.base import Reply, reply
from rhapsody_mcp.toolsets.replies.formatting import NAMES_SHOWN, duration, one_line
from rhapsody_mcp.toolsets.sessions import SessionId
from rhapsody_mcp.toolsets.tooling.schemas import TYPE_ONLY

__all__ = ["Functions"]

_CHECK_S = 45.0


class Registration(Reply):
    function: str
    registered: Annotated[dict[str, str], TYPE_ONLY]  # signatures, by name


class Functions:
    def __init__(self, sessions: SessionRegistry) -> None:
        self._sessions = sessions

    async def register_function(
        self,
        session: SessionId,
        source: Annotated[str, Field(description='E.g. "def one():\n    return 1".')],
        name: Annotated[str | None, Field(description="Default: the function's.")] = None,
        entry: Annotated[str | None, Field(description="Which function of source; default: the last.")] = None,
    ) -> Annotated[CallToolResult, Registration]:
        self._sessions.limits.policy.check_source("register_function")
        open_session = self._sessions.get(session)
        functions = open_session.functions
        earlier_names, began = functions.names, monotonic()
        function = await open_session.register(Source(source, entry or ""), name, _CHECK_S)
        shown = {name: functions.get(name).signature for name in functions.names[-NAMES_SHOWN:]}
        text = _registration_text(function, list(shown), function.name in earlier_names, monotonic() - began)
        return reply(text, Registration(function=function.name, registered=shown))


def _registration_text(function: RegisteredFunction, names: list[str], replaced: bool, seconds: float) -> str:
    summary = f" {one_line(function.docstring.splitlines()[0])}" if function.docstring else ""
    lines = [
        f"{function.name} is registered, checked on a worker in {duration(seconds)}: {function.signature}.{summary}"
    ]
    if replaced:
        lines.append("It replaces an earlier one of this name; tasks submitted before keep theirs.")
    if others := [name for name in names if name != function.name]:
        lines.append(f"Also registered: {', '.join(others)}.")
    return "\n".join([*lines, f'Use it in submit_tasks: {{"function": "{function.name}", "args": [...]}}.'])
