"""What an agent does from its first call to its last, told to whatever client can call tools and checked on the way.

Clients come with environments of their own, so nothing of rhapsody_mcp is imported here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Caller", "Refused", "travel"]

Caller = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Calls a tool and gives its structured reply. Raises Refused with the text that a model would read."""

_PIPELINE = [
    {"name": "numbers", "source": "def numbers(count):\n    return list(range(count))", "args": [10]},
    {"name": "total", "function": "builtins:sum", "args": [{"ref": "numbers"}]},
    {"name": "said", "executable": "/bin/echo", "arguments": ["the sum is", {"ref": "total"}]},
]
_SWEEP = [
    {
        "name": "runs",
        "source": "def run(rate):\n    return {'rate': rate, 'loss': (rate - 0.3) ** 2}",
        "args": [{"item": True}],
        "for_each": [0.1, 0.2, 0.3, 0.4],
    },
    {
        "name": "best",
        "source": "def best(runs):\n    return min(runs, key=lambda run: run['loss'])",
        "args": [{"ref": "runs"}],
    },
]
_SLEEPER = [{"name": "long", "executable": "/bin/sleep", "arguments": ["600"]}]


class Refused(Exception):
    """A tool call ended in an error."""


async def travel(call: Caller, *, asks: bool = False, backend: str = "local") -> None:
    """Submits, waits, reads, is refused, and closes; `asks` where the client lets a person agree.

    No call takes longer than the 5 s that some clients give it.
    """
    session = {"session": (await call("create_session", {"backends": [backend]}))["session"]}
    assert (await call("submit_tasks", {**session, "tasks": _PIPELINE}))["submitted"] == 3
    assert (await call("submit_tasks", {**session, "tasks": _SWEEP}))["submitted"] == 2
    assert (await _wait(call, session))["counts"] == {"DONE": 8}
    assert (await call("get_result", {**session, "task": "said"}))["result"].strip() == "the sum is 45"
    assert (await call("get_result", {**session, "task": "best", "path": "/rate"}))["result"] == 0.3
    assert (await call("get_result", {**session, "task": "runs"}))["total"] == 4
    assert (await call("get_statistics", session))["counts"] == {"DONE": 8}
    await _be_refused(call, session)
    await _close_while_a_task_runs(call, session, asks)
    assert session not in [{"session": row["session"]} for row in (await call("list_sessions", {}))["sessions"]]


async def _wait(call: Caller, session: dict[str, Any]) -> dict[str, Any]:
    while not (reply := await call("wait_tasks", {**session, "timeout_s": 1}))["ended"]:
        assert not reply["failures"], reply
    return reply


async def _be_refused(call: Caller, session: dict[str, Any]) -> None:
    wrong = [{"name": "wrong", "function": "builtins:sum", "args": [{"ref": "number"}]}]
    told = await _refusal(call, "submit_tasks", {**session, "tasks": wrong})
    assert "number" in told and "numbers" in told, told
    assert "timeout_s" in await _refusal(call, "wait_tasks", {**session, "timeout": 3})


async def _close_while_a_task_runs(call: Caller, session: dict[str, Any], asks: bool) -> None:
    await call("submit_tasks", {**session, "tasks": _SLEEPER})
    assert not (await call("wait_tasks", {**session, "timeout_s": 1}))["ended"]
    if not asks:
        assert "force" in await _refusal(call, "close_session", session)
    assert (await call("close_session", session if asks else {**session, "force": True}))["canceled"] == 1


async def _refusal(call: Caller, tool: str, arguments: dict[str, Any]) -> str:
    try:
        reply = await call(tool, arguments)
    except Refused as refused:
        return str(refused)
    raise AssertionError(f"{tool} was not refused: {reply}")
