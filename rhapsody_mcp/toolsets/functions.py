"""The tool that keeps functions by name."""

from __future__ import annotations

from time import monotonic
from typing import Annotated

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.runtime.functions import RegisteredFunction
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.toolsets.replies.base import Reply, duration, one_line, reply
from rhapsody_mcp.toolsets.sessions import SessionId
from rhapsody_mcp.toolsets.tooling.schemas import UNTOLD

__all__ = ["Functions"]

_CHECK_S = 45.0
_NAMES_SHOWN = 20


class Kept(Reply):
    function: str
    registered: Annotated[dict[str, str], UNTOLD]  # signatures, by name


class Functions:
    def __init__(self, sessions: SessionRegistry) -> None:
        self._sessions = sessions

    async def register_function(
        self,
        session: SessionId,
        source: Annotated[str, Field(description='E.g. "def one():\n    return 1".')],
        name: Annotated[str | None, Field(description="Default: the function's.")] = None,
        entry: Annotated[str | None, Field(description="Which function of source; default: the last.")] = None,
    ) -> Annotated[CallToolResult, Kept]:
        self._sessions.limits.policy.check_source("register_function")
        opened = self._sessions.get(session)
        functions = opened.functions
        before, began = functions.names, monotonic()
        function = await opened.register(Source(source, entry or ""), name, _CHECK_S)
        shown = {name: functions.get(name).signature for name in functions.names[-_NAMES_SHOWN:]}
        text = _kept_text(function, list(shown), function.name in before, monotonic() - began)
        return reply(text, Kept(function=function.name, registered=shown))


def _kept_text(function: RegisteredFunction, names: list[str], replaced: bool, seconds: float) -> str:
    says = f" {one_line(function.docstring.splitlines()[0])}" if function.docstring else ""
    lines = [f"{function.name} is registered, checked on a worker in {duration(seconds)}: {function.signature}.{says}"]
    if replaced:
        lines.append("It replaces an earlier one of this name; tasks submitted before keep theirs.")
    if others := [name for name in names if name != function.name]:
        lines.append(f"Also registered: {', '.join(others)}.")
    return "\n".join([*lines, f'Use it in submit_tasks: {{"function": "{function.name}", "args": [...]}}.'])
