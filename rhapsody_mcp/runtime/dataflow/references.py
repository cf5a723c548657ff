"""References in JSON: `{"ref": name}` and `{"ref": name, "path": pointer}` stand for another task's result.

`{"literal": X}` stands for X, in which nothing is a reference. In a text for a model, `{ref:name}` and
`{ref:name/pointer}` stand for a result as text, and `{{ref:name}}` is the literal `{ref:name}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.json_pointer import resolve_pointer, split_pointer
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import load_json
from rhapsody_mcp.runtime.tasks import Part, Task, Text

__all__ = [
    "is_escaped",
    "is_literal",
    "is_reference",
    "parse_texts",
    "referenced_names",
    "rename_references",
    "resolve",
]

_REFERENCE_KEYS = (frozenset({"ref"}), frozenset({"ref", "path"}))
_TEXT_REFERENCE = re.compile(r"\{\{ref:[^{}]*\}\}|\{ref:([^{}/]*)(/[^{}]*)?\}")


def parse_texts(value: Any) -> Any:
    """The JSON value with a Text in the place of each text that holds references."""
    if isinstance(value, str):
        return _parse_text(value) if "{ref:" in value else value
    if isinstance(value, dict):
        as_it_is = is_literal(value) or is_reference(value)
        return value if as_it_is else {key: parse_texts(item) for key, item in value.items()}
    return [parse_texts(item) for item in value] if isinstance(value, list | tuple) else value


def _parse_text(text: str) -> str | Text:
    parts: list[str | dict[str, str]] = []
    end = 0
    for match in _TEXT_REFERENCE.finditer(text):
        before, end = text[end : match.start()], match.end()
        parts += [before, match.group()[1:-1] if is_escaped(match) else _parse_match(match)]
    parts.append(text[end:])
    if any(isinstance(part, dict) for part in parts):
        return Text(*filter(None, parts))
    return "".join(map(str, parts))


def is_escaped(match: re.Match[str]) -> bool:
    """Whether a match in a text is escaped by doubled braces."""
    return match.group().startswith("{{")


def _parse_match(match: re.Match[str]) -> dict[str, str]:
    name, path = match.groups()
    return {"ref": name.strip(), "path": path} if path else {"ref": name.strip()}


def referenced_names(value: Any) -> Iterator[str]:
    """The names in the references of a JSON value. Raises InvalidTask for a malformed reference."""
    if isinstance(value, Text):
        value = value.parts
    if isinstance(value, dict) and "ref" in value:
        yield _checked_reference(value)["ref"]
    elif isinstance(value, dict) and not is_literal(value):
        for item in value.values():
            yield from referenced_names(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from referenced_names(item)


def rename_references(value: Any, uid_of: Callable[[str], str], *, texts: bool = False) -> Any:
    """The JSON value with `uid_of(name)` in the place of each referenced name; with `texts`, also in texts."""
    if is_reference(value):
        return {**value, "ref": uid_of(value["ref"])}
    if isinstance(value, dict):
        if is_literal(value):
            return value
        return {key: rename_references(item, uid_of, texts=texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rename_references(item, uid_of, texts=texts) for item in value]
    if texts and isinstance(value, str):
        return _TEXT_REFERENCE.sub(lambda match: _rename_match(match, uid_of), value)
    return value


def _rename_match(match: re.Match[str], uid_of: Callable[[str], str]) -> str:
    if is_escaped(match):
        return match.group()
    return f"{{ref:{uid_of(_parse_match(match)['ref'])}{match.group(2) or ''}}}"


def resolve(value: Any, task_named: Callable[[str], Task]) -> Any:
    """The value with a task, or a Part of a task, in the place of each reference, also in a Text.

    Raises InvalidTask for a path that an available result does not have.
    """
    if is_reference(value):
        task = task_named(value["ref"])
        return task if value.get("path") is None else _part(task, value["path"])
    if isinstance(value, dict):
        if is_literal(value):
            return value["literal"]
        return {key: resolve(item, task_named) for key, item in value.items()}
    if isinstance(value, Text):
        return Text(*resolve(value.parts, task_named))
    return [resolve(item, task_named) for item in value] if isinstance(value, list | tuple) else value


def is_literal(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"literal"}


def is_reference(value: Any) -> bool:
    return isinstance(value, dict) and "ref" in value and value.keys() in _REFERENCE_KEYS


def _checked_reference(reference: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in reference.keys() - {"ref", "path"}:
        raise InvalidTask(
            f"unknown key {key!r} beside ref{nearest(key, ['path'])}. A reference has the key ref, or ref and path; "
            'a dict that only looks like a reference goes in as {"literal": ...}.'
        )
    if not isinstance(reference["ref"], str) or not isinstance(reference.get("path"), str | None):
        raise InvalidTask(
            f"{dict(reference)} is no reference: ref is a task's name, as in {{'ref': 'train'}}, and path a JSON "
            "Pointer, as in '/0/label'. Write {'literal': ...} around a dict that is data."
        )
    split_pointer(reference.get("path") or "")
    return reference


def _part(task: Task, path: str) -> Part:
    value = task.outcome.value if task.outcome and task.state is TaskState.DONE else None
    if value is not None and value.data is not None and value.format == "json":
        try:
            resolve_pointer(load_json(value), path)
        except InvalidTask as error:
            raise InvalidTask(f"of the result of {task.name or task.uid}, {error}", field="path") from error
    return Part(task, path)
