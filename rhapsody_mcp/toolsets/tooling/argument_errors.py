"""Says which argument of a call is wrong, what is valid there, and which name was perhaps meant."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from rhapsody_mcp.model.errors import nearest
from rhapsody_mcp.runtime.requests.field_types import NAME_PATTERN, UNION_TAGS
from rhapsody_mcp.toolsets.tooling.errors import correct_and_repeat, refusal_text
from rhapsody_mcp.toolsets.tooling.schemas import field_at, field_names
from rhapsody_mcp.toolsets.vocabulary import suggestion

__all__ = ["invalid_arguments_text", "unknown_argument_text", "unreadable_argument_text"]

Location = tuple[int | str, ...]
Problem = Mapping[str, Any]
"""An error of pydantic, as `ValidationError.errors` gives it."""
_PROBLEMS_SHOWN, _OWNERS_SHOWN = 3, 2
_VALUE_CHARS, _EXAMPLE_CHARS, _NAME_CHARS = 80, 60, 64
_DEEPEST = 100
_DECODER = json.JSONDecoder(strict=False)


def unknown_argument_text(names: Iterable[str], schema: dict[str, Any], tool: str) -> str | None:
    """The text for the first name that is no argument of the tool; None where the tool has them all."""
    known = field_names(schema, ())
    unknown = next((name for name in names if name not in known), None)
    if unknown is None:
        return None
    wrong = f"{tool} has no argument {_short(unknown)}{suggestion(unknown, known)}."
    valid = _valid_names(known) or "It takes none."
    return refusal_text("unknown_argument", f"{wrong} {valid}", correct_and_repeat(tool))


def unreadable_argument_text(arguments: Mapping[str, Any], tool: str) -> str | None:
    """The text for the first value that few programs can write or read as JSON; None where there is no such value."""
    for location, value in _containers_and_texts(arguments):
        if len(location) > _DEEPEST:
            path = _path(location[:3], arguments)
            wrong = f"{path} is too deep. Valid are at most {_DEEPEST} lists and objects in each other."
        elif any(_has_lone_surrogate(text) for text in (value, *(value if isinstance(value, dict) else ()))):
            path = _path(location[:_DEEPEST], arguments)
            wrong = f"{path} holds half a character (a lone surrogate). Valid is Unicode text."
        else:
            continue
        return refusal_text("invalid_argument", wrong, correct_and_repeat(tool))
    return None


def _containers_and_texts(arguments: Mapping[str, Any]) -> Iterator[tuple[Location, Any]]:
    """Every text, list and object at every depth, with its location; not recursive, as the depth has no bound."""
    pending: list[tuple[Location, Any]] = [((), arguments)]
    while pending:
        location, value = pending.pop()
        yield location, value
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        pending += [((*location, step), part) for step, part in inside if isinstance(part, str | list | dict)]


def _has_lone_surrogate(text: object) -> bool:
    if not isinstance(text, str) or text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# --- what pydantic refuses


def invalid_arguments_text(
    error: ValidationError, schema: dict[str, Any], arguments: Mapping[str, Any], tool: str
) -> str:
    """The text for arguments of a wrong type, range or size."""
    by_location: dict[Location, list[Problem]] = {}
    for problem in error.errors(include_url=False):
        by_location.setdefault(_location(problem, arguments), []).append(problem)
    unknown = dict.fromkeys(
        location for location, problems in by_location.items() if problems[0]["type"] == "extra_forbidden"
    )
    sentences = [
        _sentence(location, problems, schema, arguments)
        for location, problems in by_location.items()
        if location not in unknown
    ]
    sentences += _unknown_fields(unknown, schema, arguments)
    shown = sentences[:_PROBLEMS_SHOWN]
    if len(sentences) > _PROBLEMS_SHOWN:
        shown.append(f"And {len(sentences) - _PROBLEMS_SHOWN} more problems.")
    shown += dict.fromkeys(_valid_names(field_names(schema, location[:-1])) for location in unknown)
    return refusal_text("invalid_argument", " ".join(shown).rstrip(), correct_and_repeat(tool))


def _location(problem: Problem, arguments: Mapping[str, Any]) -> Location:
    """The location of the wrong value, without the names of union members that pydantic adds."""
    location: Location = tuple(step for step in problem["loc"] if step not in UNION_TAGS)
    value: Any = arguments
    for depth, step in enumerate(location):
        if not isinstance(value, dict | list) or (isinstance(value, dict) and step not in value):
            return location if problem["type"] == "missing" else location[:depth]
        value = _item(value, step)
    return location


def _unknown_fields(locations: Iterable[Location], schema: dict[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """A sentence for each unknown field, as in `tasks[0] and tasks[1] have no field 'x'.`"""
    owners: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for location in locations:
        known = tuple(field_names(schema, location[:-1]))
        owners.setdefault((str(location[-1]), known), []).append(_path(location[:-1], arguments))
    return [
        f"{_joined(paths)} {'has' if len(paths) == 1 else 'have'} no field {_short(name)}{suggestion(name, known)}."
        for (name, known), paths in owners.items()
    ]


def _joined(paths: Sequence[str]) -> str:
    more = [f"{len(paths) - _OWNERS_SHOWN} more"] if len(paths) > _OWNERS_SHOWN else []
    return " and ".join([*paths[:_OWNERS_SHOWN], *more])


def _sentence(location: Location, problems: list[Problem], schema: dict[str, Any], arguments: Mapping[str, Any]) -> str:
    """As in `tasks[0].ranks must be a whole number of at least 1, not 0.`"""
    first, path = problems[0], _path(location, arguments)
    if first["type"] == "missing":
        return f"{path} is missing."
    field = field_at(schema, location)
    kinds = list(dict.fromkeys(_valid_values(problem, field) for problem in problems))
    valid = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[:-1] else kinds)
    near = nearest(str(first["input"]), field.get("enum", ())) if first["type"] == "literal_error" else ""
    by_name = location[-1] == "args" and isinstance(first["input"], dict) and "ref" not in first["input"]
    kwargs = " Arguments by name go into kwargs." if by_name else ""
    return f"{path} must be {valid}{_example_for(first, field)}, not {_short(first['input'])}{near}.{kwargs}"


def _example_for(problem: Problem, field: dict[str, Any]) -> str:
    value = problem["input"]
    example = "" if "ctx" in problem else _example(field)
    if isinstance(value, str) and "object" in field.get("type", ()):
        return "".join(f", or {stand_in}" for sign, stand_in in _STAND_INS.items() if sign in value) or example
    return example


_STAND_INS = {"{item": '{"item": true}', "{ref:": '{"ref": "name"}'}
"""By the beginning of a placeholder in a text, the object to write where no text can stand."""


def _valid_values(problem: Problem, field: dict[str, Any]) -> str:
    """The valid values, in words that need no knowledge of this program."""
    kind, limits = str(problem["type"]), problem.get("ctx", {})
    match kind:
        case "string_pattern_mismatch":
            return _PATTERNS.get(limits["pattern"], f"a text that matches {limits['pattern']}")
        case "string_too_short":
            return f"a text of at least {_count(limits['min_length'], 'character')}"
        case "string_too_long":
            return f"a text of at most {_count(limits['max_length'], 'character')}"
        case "too_short":
            if limits.get("field_type") == "Dictionary":
                return f"an object of at least {_count(limits['min_length'], 'name')}"
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
        case "value_error":
            return str(limits["error"])
    word = _KINDS.get(kind.partition("_")[0], "of another kind")
    return word + _range(field) if word.endswith("number") else word


_KINDS = {
    **{"string": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"},
    **{"list": "a list", "dict": "an object", "model": "an object"},
}
"""By the first word of a problem's type, as in `int_type`, `int_parsing` and `int_from_float`."""
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


def _example(field: Mapping[str, Any]) -> str:
    """The JSON value after "e.g." in the field's description; empty where there is none, or a long one."""
    _, mark, rest = str(field.get("description", "")).partition("e.g. ")
    try:
        _, end = _DECODER.raw_decode(rest) if mark else (None, 0)
    except ValueError:
        return ""
    return f", as in {rest[:end]}" if 0 < end <= _EXAMPLE_CHARS else ""


# --- values in words


def _path(location: Location, arguments: Mapping[str, Any]) -> str:
    """As in `tasks[3] ('train').temperature`."""
    text, value = "", arguments
    for step in location:
        step = step if isinstance(step, int) else step[:_VALUE_CHARS]
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
        value = _item(value, step)
        if isinstance(step, int) and isinstance(value, Mapping) and isinstance(value.get("name"), str):
            text += f" ({value['name'][:_NAME_CHARS]!r})"
    return text


def _item(value: Any, step: int | str) -> Any:
    try:
        return value[step]
    except (KeyError, IndexError, TypeError):
        return None


def _valid_names(known: list[str]) -> str:
    return f"Valid: {', '.join(known)}." if known else ""


def _short(value: object) -> str:
    """The beginning of a value on one line: a text as Python writes it, other values as JSON."""
    try:
        text = repr(value[:_VALUE_CHARS]) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"this {type(value).__name__}"
    return text if len(text) <= _VALUE_CHARS else f"{text[: _VALUE_CHARS - 3]}..."
