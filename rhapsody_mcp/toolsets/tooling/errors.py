"""Says in one short text what was wrong with a call, what is valid, and what to call next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from rhapsody_mcp.model.errors import RhapsodyError, nearest
from rhapsody_mcp.runtime.requests.field_types import NAME_PATTERN, UNION_TAGS
from rhapsody_mcp.toolsets.replies.base import one_line
from rhapsody_mcp.toolsets.tooling.schemas import field_at, field_names
from rhapsody_mcp.toolsets.vocabulary import in_our_words

__all__ = [
    "refuse_answer",
    "refuse_arguments",
    "refuse_call",
    "refuse_crash",
    "refuse_unknown_arguments",
    "refuse_unreadable",
]

Location = tuple[int | str, ...]
Problem = Mapping[str, Any]
_MAX_BYTES = 1000
_PROBLEMS_SHOWN, _OWNERS_SHOWN = 3, 2
_SHOWN_CHARS, _EXAMPLE_CHARS = 80, 60
_DEEPEST = 100
_DECODER = json.JSONDecoder(strict=False)
_NEXT = {
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


def refuse_call(error: RhapsodyError, tool: str) -> str:
    """For what the runtime refused."""
    return _text(error.code, str(error), _NEXT.get(error.code, f"Correct it and call {tool} again."))


def refuse_unknown_arguments(given: Iterable[str], schema: dict[str, Any], tool: str) -> str | None:
    """For arguments that the tool does not have; None where it has them all."""
    known = field_names(schema, ())
    unknown = [name for name in given if name not in known]
    if not unknown:
        return None
    wrong = f"{tool} has no argument {_short(unknown[0])}{in_our_words(unknown[0], known)}."
    return _text(
        "unknown_argument", f"{wrong} {_listed(known) or 'It takes none.'}", f"Correct it and call {tool} again."
    )


def refuse_unreadable(arguments: Mapping[str, Any], tool: str) -> str | None:
    """For what no JSON text can hold, or only one that few programs read; None where there is no such thing."""
    for location, value in _parts(arguments):
        if len(location) > _DEEPEST:
            where = _where(location[:3], arguments)
            wrong = f"{where} is too deep. Valid are at most {_DEEPEST} lists and objects in each other."
        elif any(_is_broken(text) for text in (value, *(value if isinstance(value, dict) else ()))):
            where = _where(location[:_DEEPEST], arguments)
            wrong = f"{where} holds half a character (a lone surrogate). Valid is Unicode text."
        else:
            continue
        return _text("invalid_argument", wrong, f"Correct it and call {tool} again.")
    return None


def refuse_arguments(error: ValidationError, schema: dict[str, Any], arguments: Mapping[str, Any], tool: str) -> str:
    """For arguments of a wrong type, range or size."""
    places: dict[Location, list[Problem]] = {}
    for problem in error.errors(include_url=False):
        places.setdefault(_place(problem, arguments), []).append(problem)
    unknown = {place for place, problems in places.items() if problems[0]["type"] == "extra_forbidden"}
    told = [_told(place, problems, schema, arguments) for place, problems in places.items() if place not in unknown]
    told += _unknown_fields([place for place in places if place in unknown], schema, arguments)
    shown = told[:_PROBLEMS_SHOWN]
    if len(told) > _PROBLEMS_SHOWN:
        shown.append(f"And {len(told) - _PROBLEMS_SHOWN} more problems.")
    shown += dict.fromkeys(_listed(field_names(schema, place[:-1])) for place in places if place in unknown)
    return _text("invalid_argument", " ".join(shown).rstrip(), f"Correct it and call {tool} again.")


def _unknown_fields(places: Sequence[Location], schema: dict[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """A sentence for each name, however many have it, as in `tasks[0] and tasks[1] have no field 'x'.`"""
    owners: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for place in places:
        known = tuple(field_names(schema, place[:-1]))
        owners.setdefault((str(place[-1]), known), []).append(_where(place[:-1], arguments))
    return [
        f"{_joined(where)} {'has' if len(where) == 1 else 'have'} no field {_short(name)}{in_our_words(name, known)}."
        for (name, known), where in owners.items()
    ]


def _joined(where: Sequence[str]) -> str:
    more = [f"{len(where) - _OWNERS_SHOWN} more"] if len(where) > _OWNERS_SHOWN else []
    return " and ".join([*where[:_OWNERS_SHOWN], *more])


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


def _parts(arguments: Mapping[str, Any]) -> Iterator[tuple[Location, Any]]:
    """Every text, list and object at every depth, with the way to it; without recursion, for what is too deep."""
    pending: list[tuple[Location, Any]] = [((), arguments)]
    while pending:
        location, value = pending.pop()
        yield location, value
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        pending += [((*location, step), part) for step, part in inside if isinstance(part, str | list | dict)]


def _is_broken(text: object) -> bool:
    if not isinstance(text, str) or text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _place(problem: Problem, arguments: Mapping[str, Any]) -> Location:
    """What the problem is about: after it pydantic names the choices of a union."""
    location: Location = tuple(step for step in problem["loc"] if step not in UNION_TAGS)
    value: Any = arguments
    for depth, step in enumerate(location):
        if not isinstance(value, dict | list) or (isinstance(value, dict) and step not in value):
            return location if problem["type"] == "missing" else location[:depth]
        value = _item(value, step)
    return location


def _told(place: Location, problems: list[Problem], schema: dict[str, Any], arguments: Mapping[str, Any]) -> str:
    first, where = problems[0], _where(place, arguments)
    if first["type"] == "missing":
        return f"{where} is missing."
    field = field_at(schema, place)
    kinds = list(dict.fromkeys(_valid(problem, field) for problem in problems))
    near = nearest(str(first["input"]), _choices(first)) if first["type"] == "literal_error" else ""
    valid = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[:-1] else kinds)
    example = "" if "ctx" in first else _example(field)
    if isinstance(first["input"], str) and "object" in field.get("type", ()):
        example = "".join(f", or {stands}" for sign, stands in _STAND_INS.items() if sign in first["input"]) or example
    by_name = place[-1] == "args" and isinstance(first["input"], dict) and "ref" not in first["input"]
    kwargs = " Arguments by name go into kwargs." if by_name else ""
    return f"{where} must be {valid}{example}, not {_short(first['input'])}{near}.{kwargs}"


_STAND_INS = {"{item": '{"item": true}', "{ref:": '{"ref": "name"}'}


def _valid(problem: Problem, field: dict[str, Any]) -> str:
    """In words that need no knowledge of this program."""
    kind, limits = str(problem["type"]), problem.get("ctx", {})
    match kind:
        case "string_pattern_mismatch":
            return _PATTERNS.get(limits["pattern"], f"a text that matches {limits['pattern']}")
        case "string_too_short":
            return f"a text of at least {_count(limits['min_length'], 'character')}"
        case "string_too_long":
            return f"a text of at most {_count(limits['max_length'], 'character')}"
        case "too_short":
            return f"a list of at least {_count(limits['min_length'], 'item')}"
        case "too_long":
            return f"a list of at most {_count(limits['max_length'], 'item')}"
        case "greater_than_equal":
            return f"at least {_number(limits['ge'])}"
        case "greater_than":
            return f"more than {_number(limits['gt'])}"
        case "less_than_equal":
            return f"at most {_number(limits['le'])}"
        case "less_than":
            return f"less than {_number(limits['lt'])}"
        case "finite_number":
            return f"a finite number{_range(field)}"
        case "literal_error":
            return str(limits["expected"])
        case "number":
            return f"a number{_range(field)}"
    word = _KINDS.get(kind.partition("_")[0], "of another kind")
    return word + _range(field) if word.endswith("number") else word


_KINDS = {
    **{"string": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"},
    **{"list": "a list", "dict": "an object", "model": "an object"},
}
"""By the beginning of the type of a problem, as in `int_type`, `int_parsing` and `int_from_float`."""
_PATTERNS = {
    NAME_PATTERN: "letters, digits, '_', '.' and '-', a letter first, 64 characters at most",
    r"[^|\s]": "a text that says what to look for, with '|' between choices",
}


def _range(field: Mapping[str, Any]) -> str:
    least, most = field.get("minimum"), field.get("maximum")
    if least is not None:
        return f" from {_number(least)} to {_number(most)}" if most is not None else f" of at least {_number(least)}"
    return f" above {_number(field['exclusiveMinimum'])}" if "exclusiveMinimum" in field else ""


def _number(limit: float) -> str:
    return f"{limit:g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _choices(problem: Problem) -> list[str]:
    """Of a literal: pydantic writes them as in `'all' or 'any'`."""
    return re.findall(r"'([^']*)'", problem["ctx"]["expected"])


def _example(field: Mapping[str, Any]) -> str:
    """The JSON value that the field's description gives for one; empty where it gives none, or a long one."""
    _, found, rest = str(field.get("description", "")).partition("e.g. ")
    try:
        _, end = _DECODER.raw_decode(rest) if found else (None, 0)
    except ValueError:
        return ""
    return f", as in {rest[:end]}" if 0 < end <= _EXAMPLE_CHARS else ""


def _where(location: Location, arguments: Mapping[str, Any]) -> str:
    """As in `tasks[3] ('train').temperature`."""
    text, value = "", arguments
    for step in location:
        step = step if isinstance(step, int) else step[:_SHOWN_CHARS]
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


def _listed(known: list[str]) -> str:
    return f"Valid: {', '.join(known)}." if known else ""


def _short(value: object) -> str:
    """As JSON has it, and texts as Python does: on one line, and its beginning where it is long."""
    try:
        text = repr(value[:_SHOWN_CHARS]) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"this {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def _text(code: str, wrong: str, next_call: str) -> str:
    """At most 1,000 bytes of text that any program can show, with what to do next always in it."""
    room = _MAX_BYTES - len(f"{code}:  {next_call}".encode())
    wrong = one_line(wrong.encode("utf-8", "backslashreplace").decode())
    if len(raw := wrong.encode()) > room:
        part = (room - 5) // 2
        wrong = f"{raw[:part].decode('utf-8', 'ignore')} ... {raw[-part:].decode('utf-8', 'ignore')}"
    return f"{code}: {wrong} {next_call}"
