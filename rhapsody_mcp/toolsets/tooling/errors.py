"""Says in one short text what was wrong with a call, what is valid, and what to call next."""

from __future__ import annotations

from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.toolsets.replies.formatting import one_line

__all__ = ["correct_and_repeat", "error_text", "internal_error_text", "invalid_answer_text", "refusal_text"]

_MAX_BYTES = 1000
_NEXT_CALLS = {
    "unknown_session": "Call list_sessions to see what is open, or create_session for a new one.",
    "unknown_task": "Call list_tasks to see the tasks of this session.",
    "unknown_backend": "Call list_sessions to see the backends of this session.",
    "result_gone": "Call submit_tasks for its task again, under the same name.",
    "limit_exceeded": "describe_system shows this server's limits.",
    "session_closed": "Call create_session for a new one.",
    "needs_force": "If that is what the person wants, call again with force=true.",
    "not_confirmed": "Ask the person how to go on.",
    "backend_unavailable": "Call describe_system to see what works on this machine.",
    "invalid_settings": "Call describe_system to see what works on this machine.",
}
"""By the code of the error."""


def error_text(error: RhapsodyError, tool: str) -> str:
    """The text for an error that the runtime raised."""
    return refusal_text(error.code, str(error), _NEXT_CALLS.get(error.code, correct_and_repeat(tool)))


def correct_and_repeat(tool: str) -> str:
    return f"Correct it and call {tool} again."


def invalid_answer_text(tool: str) -> str:
    """The text for a client whose answer to a question does not fit the form."""
    return refusal_text(
        "invalid_answer",
        "the client's answer to the question whether to go on cannot be read; nothing was changed.",
        f"If that is what the person wants, call {tool} again with force=true.",
    )


def internal_error_text(tool: str) -> str:
    """The text for an exception that no code expected."""
    return refusal_text(
        "internal_error",
        f"{tool} failed inside the server; that is the server's mistake, not yours.",
        "Call list_sessions to see what is open; the server's log on stderr has the details.",
    )


def refusal_text(code: str, wrong: str, next_call: str) -> str:
    """At most 1,000 bytes of text that any program can show; the code and the next call are never cut."""
    room = _MAX_BYTES - len(f"{code}:  {next_call}".encode())
    wrong = one_line(wrong.encode("utf-8", "backslashreplace").decode())
    if len(data := wrong.encode()) > room:
        part = (room - 5) // 2
        wrong = f"{data[:part].decode('utf-8', 'ignore')} ... {data[-part:].decode('utf-8', 'ignore')}"
    return f"{code}: {wrong} {next_call}"
