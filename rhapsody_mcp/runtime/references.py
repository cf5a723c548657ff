"""References in JSON: `{"ref": name}` and `{"ref": name, "path": pointer}` stand for another task's result.

`{"literal": X}` stands for X as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import follow, load_json, pointer_steps
from rhapsody_mcp.runtime.tasks import Part, Task

__all__ = ["names_in", "renamed", "resolve"]

_SHAPES = (frozenset({"ref"}), frozenset({"ref", "path"}))


def names_in(value: Any) -> Iterator[str]:
    """Every name that is referred to in a JSON value. Raises InvalidTask for a malformed reference."""
    if isinstance(value, dict) and "ref" in value:
        yield _checked(value)["ref"]
    elif isinstance(value, dict) and value.keys() != {"literal"}:
        for item in value.values():
            yield from names_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from names_in(item)


def renamed(value: Any, uid_of: Callable[[str], str]) -> Any:
    """The same JSON value with `uid_of` each name in the place of that name."""
    if _is_reference(value):
        return {**value, "ref": uid_of(value["ref"])}
    if isinstance(value, dict):
        return value if value.keys() == {"literal"} else {key: renamed(item, uid_of) for key, item in value.items()}
    return [renamed(item, uid_of) for item in value] if isinstance(value, list | tuple) else value


def resolve(value: Any, task_named: Callable[[str], Task]) -> Any:
    """The value with a task, or a Part of one, in the place of each reference.

    Raises InvalidTask for a path that leads nowhere in a result that is there already.
    """
    if _is_reference(value):
        task = task_named(value["ref"])
        return task if value.get("path") is None else _part(task, value["path"])
    if isinstance(value, dict):
        if value.keys() == {"literal"}:
            return value["literal"]
        return {key: resolve(item, task_named) for key, item in value.items()}
    return [resolve(item, task_named) for item in value] if isinstance(value, list | tuple) else value


def _is_reference(value: Any) -> bool:
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
    pointer_steps(reference.get("path") or "")
    return reference


def _part(task: Task, path: str) -> Part:
    value = task.outcome.value if task.outcome and task.state is TaskState.DONE else None
    if value is not None and value.data is not None and value.format == "json":
        follow(load_json(value), path)
    return Part(task, path)
