"""Says in one short text what was wrong with a call, what is valid, and what to call next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from rhapsody_mcp.model.errors import (
    BackendUnavailable,
    InvalidRequest,
    InvalidSettings,
    InvalidTask,
    NeedsForce,
    NotConfirmed,
    RhapsodyError,
    SessionClosed,
    UnknownName,
    nearest,
)
from rhapsody_mcp.toolsets.schemas import field_names

__all__ = ["refuse_answer", "refuse_arguments", "refuse_call", "refuse_crash", "refuse_unknown_arguments"]

_MAX_BYTES = 1000
_PROBLEMS_SHOWN = 3
_CODES: dict[type[RhapsodyError], str] = {
    SessionClosed: "session_closed",
    NeedsForce: "needs_force",
    NotConfirmed: "not_confirmed",
    InvalidSettings: "invalid_settings",
    InvalidTask: "invalid_task",
    InvalidRequest: "invalid_request",
    BackendUnavailable: "backend_unavailable",
}
_NEXT = {
    "unknown_session": "Call list_sessions to see what is open, or create_session for a new one.",
    "unknown_task": "Call list_tasks to see the tasks of this session.",
    "unknown_backend": "Call list_sessions to see the backends of this session.",
    "session_closed": "Call create_session for a new one.",
    "needs_force": "If that is what the person wants, call again with force=true.",
    "not_confirmed": "Ask the person how to go on.",
    "backend_unavailable": "Call describe_system to see what works on this machine.",
    "invalid_settings": "Call describe_system to see what works on this machine.",
}


def refuse_call(error: RhapsodyError, tool: str) -> str:
    """For what the runtime refused."""
    code = f"unknown_{error.kind}" if isinstance(error, UnknownName) else _code(error)
    return _text(code, str(error), _NEXT.get(code, f"Correct it and call {tool} again."))


def refuse_unknown_arguments(given: Iterable[str], schema: dict[str, Any], tool: str) -> str | None:
    """For arguments that the tool does not have; None where it has them all."""
    known = field_names(schema, ())
    unknown = [name for name in given if name not in known]
    if not unknown:
        return None
    wrong = f"{tool} has no argument {unknown[0]!r}{nearest(unknown[0], known)}."
    return _text("unknown_argument", f"{wrong} {_valid(known)}", f"Correct it and call {tool} again.")


def refuse_arguments(error: ValidationError, schema: dict[str, Any], arguments: Mapping[str, Any], tool: str) -> str:
    """For arguments of a wrong type, range or size."""
    problems = error.errors(include_url=False, include_context=True)
    shown = [_problem(problem, schema, arguments) for problem in problems[:_PROBLEMS_SHOWN]]
    if len(problems) > _PROBLEMS_SHOWN:
        shown.append(f"And {len(problems) - _PROBLEMS_SHOWN} more problems.")
    return _text("invalid_argument", " ".join(shown), f"Correct it and call {tool} again.")


def refuse_answer(tool: str) -> str:
    """For a client that answers a question otherwise than it was asked."""
    return _text(
        "invalid_answer",
        "the client's answer to the question whether to go on cannot be read; nothing was changed.",
        f"If that is what the person wants, call {tool} again with force=true.",
    )


def refuse_crash(tool: str) -> str:
    """For a mistake of this server."""
    return _text(
        "internal_error",
        f"{tool} failed inside the server; that is the server's mistake, not yours.",
        "Call list_sessions to see what is open; the server's log on stderr has the details.",
    )


def _code(error: RhapsodyError) -> str:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), "failed")


def _problem(problem: Mapping[str, Any], schema: dict[str, Any], arguments: Mapping[str, Any]) -> str:
    location = problem["loc"]
    where = _where(location, arguments)
    if problem["type"] == "extra_forbidden":
        owner, field = location[:-1], str(location[-1])
        known = field_names(schema, owner)
        return f"{_where(owner, arguments)} has no field {field!r}{nearest(field, known)}. {_valid(known)}"
    if problem["type"] == "missing":
        return f"{where} is missing."
    near = nearest(str(problem["input"]), _choices(problem)) if problem["type"] == "literal_error" else ""
    return f"{where} must be {_plain(problem)}, not {_short(problem['input'])}{near}."


def _plain(problem: Mapping[str, Any]) -> str:
    """What is valid, in words that need no knowledge of this program."""
    limits = problem.get("ctx", {})
    told = {
        "string_pattern_mismatch": "letters, digits, '_', '.' and '-', a letter first, 64 characters at most",
        "too_short": f"a list of at least {limits.get('min_length')} item",
        "greater_than_equal": f"at least {_number(limits.get('ge'))}",
        "greater_than": f"more than {_number(limits.get('gt'))}",
        "less_than_equal": f"at most {_number(limits.get('le'))}",
        "literal_error": str(limits.get("expected")),
        "finite_number": "a finite number",
    }
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}
    kinds |= {"list": "a list", "dict": "an object", "model": "an object"}
    kind = str(problem["type"])
    return told.get(kind) or kinds.get(kind.partition("_")[0]) or str(problem["msg"])


def _number(limit: object) -> str:
    return f"{limit:g}" if isinstance(limit, int | float) else str(limit)


def _choices(problem: Mapping[str, Any]) -> list[str]:
    """Of a literal: pydantic writes them as in `'all' or 'any'`."""
    return re.findall(r"'([^']*)'", problem["ctx"]["expected"])


def _where(location: tuple[int | str, ...], arguments: Mapping[str, Any]) -> str:
    """As in `tasks[3] ('train').temperature`."""
    text, value = "", arguments
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
        value = _item(value, step)
        if isinstance(step, int) and isinstance(value, Mapping) and isinstance(value.get("name"), str):
            text += f" ({value['name'][:64]!r})"
    return text


def _item(value: Any, step: int | str) -> Any:
    try:
        return value[step]
    except (KeyError, IndexError, TypeError):
        return None


def _valid(known: list[str]) -> str:
    return f"Valid: {', '.join(known)}." if known else "It takes none."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(code: str, wrong: str, next_call: str) -> str:
    """At most 1,000 bytes, with what to do next always in it."""
    room = _MAX_BYTES - len(f"{code}:  {next_call}".encode())
    raw = wrong.encode("utf-8", "replace")
    if len(raw) > room:
        wrong = raw[: room - 4].decode("utf-8", "ignore") + " ..."
    return f"{code}: {wrong} {next_call}"
