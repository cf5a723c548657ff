"""References in JSON: `{"ref": name}` and `{"ref": name, "path": pointer}` stand for another task's result.

`{"literal": X}` stands for X as it is. In a text for a model `{ref:name}` and `{ref:name/pointer}` stand for a result
as text, and `{{ref:name}}` for `{ref:name}` as it is.
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

__all__ = ["is_literal", "is_reference", "names_in", "renamed", "resolve", "with_parts"]

_SHAPES = (frozenset({"ref"}), frozenset({"ref", "path"}))
_IN_TEXT = re.compile(r"\{\{ref:[^{}]*\}\}|\{ref:([^{}/]*)(/[^{}]*)?\}")


def with_parts(value: Any) -> Any:
    """The same JSON value with a Text of texts and references in the place of each text that holds references."""
    if isinstance(value, str):
        return _parted(value) if "{ref:" in value else value
    if isinstance(value, dict):
        as_it_is = is_literal(value) or is_reference(value)
        return value if as_it_is else {key: with_parts(item) for key, item in value.items()}
    return [with_parts(item) for item in value] if isinstance(value, list | tuple) else value


def _parted(text: str) -> str | Text:
    parts: list[str | dict[str, str]] = []
    end = 0
    for found in _IN_TEXT.finditer(text):
        before, end = text[end : found.start()], found.end()
        parts += [before, found.group()[1:-1] if _is_escaped(found) else _reference(found)]
    parts.append(text[end:])
    if any(isinstance(part, dict) for part in parts):
        return Text(*filter(None, parts))
    return "".join(map(str, parts))


def _is_escaped(found: re.Match[str]) -> bool:
    return found.group().startswith("{{")


def _reference(found: re.Match[str]) -> dict[str, str]:
    name, path = found.groups()
    return {"ref": name.strip(), "path": path} if path else {"ref": name.strip()}


def names_in(value: Any) -> Iterator[str]:
    """Every name that is referred to in a JSON value. Raises InvalidTask for a malformed reference."""
    if isinstance(value, Text):
        value = value.parts
    if isinstance(value, dict) and "ref" in value:
        yield _checked(value)["ref"]
    elif isinstance(value, dict) and not is_literal(value):
        for item in value.values():
            yield from names_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from names_in(item)


def renamed(value: Any, uid_of: Callable[[str], str], *, texts: bool = False) -> Any:
    """The same JSON value with `uid_of` each name in the place of that name; with `texts`, also in texts."""
    if is_reference(value):
        return {**value, "ref": uid_of(value["ref"])}
    if isinstance(value, dict):
        return value if is_literal(value) else {key: renamed(item, uid_of, texts=texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(item, uid_of, texts=texts) for item in value]
    return _IN_TEXT.sub(lambda found: _renamed(found, uid_of), value) if texts and isinstance(value, str) else value


def _renamed(found: re.Match[str], uid_of: Callable[[str], str]) -> str:
    if _is_escaped(found):
        return found.group()
    return f"{{ref:{uid_of(_reference(found)['ref'])}{found.group(2) or ''}}}"


def resolve(value: Any, task_named: Callable[[str], Task]) -> Any:
    """The value with a task, or a Part of one, in the place of each reference, also in a Text.

    Raises InvalidTask for a path that leads nowhere in a result that is there already.
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
    return isinstance(value, dict) and "ref" in value and value.keys() in _SHAPES


def _checked(reference: Mapping[str, Any]) -> Mapping[str, Any]:
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
