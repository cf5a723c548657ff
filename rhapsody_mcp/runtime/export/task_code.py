"""Writes the Python code that makes a task again."""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import msgspec

from rhapsody_mcp.runtime.export.literals import Code, write_call, write_value
from rhapsody_mcp.runtime.redaction import looks_secret
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, ForEach, Part, Task, Text

__all__ = ["TaskCode", "representative", "top_level"]

_TEXT_FIELDS = {"prompt", "messages", "system_prompt", "model", "arguments", "task_backend_specific_kwargs"}
_TASK_CLASSES: tuple[type[Task], ...] = (Task, ComputeTask, AITask)
_PARAMETERS = {kind: inspect.signature(kind).parameters for kind in _TASK_CLASSES}
_OWN_FIELDS = {
    kind: [name for name, field in parameters.items() if field.kind is not field.VAR_KEYWORD]
    for kind, parameters in _PARAMETERS.items()
}
"""The fields that only this kind of task has."""
_FLOW_DEFAULTS = {name: _PARAMETERS[Task][name].default for name in ("retries", "retry_delay_s", "on_upstream_failure")}
_ITEM_MARK = f"<{secrets.token_hex(8)}>"
_ITEM = Part(cast(Task, _ITEM_MARK))
"""Stands for the item while the task for one is written, as do parts of it; in a text it stands as JSON."""
_ITEM_IN_TEXT = re.compile(rf'\{{"task":"{_ITEM_MARK}","path":("(?:[^"\\]|\\.)*")\}}')


def representative(task: Task) -> Task:
    """The task itself; of a ForEach the one that it makes, with something that stands for the item."""
    return task.make(_ITEM, 0) if isinstance(task, ForEach) else task


def top_level(task: Task) -> Task:
    """The task that a script makes: of one of a for_each, the for_each."""
    return task.parent or task


class TaskCode:
    """Knows the variable of each task, by uid, and the expression for each source.

    A task that has no variable is not there: None stands for its result. `also_after` are tasks that one comes after
    besides those that it names, by uid. `looked_up` are the environment variables that stand for secrets.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        functions: Mapping[Source, str],
        also_after: Mapping[str, Sequence[Task]] = MappingProxyType({}),
    ) -> None:
        self._variables, self._functions, self._also_after = variables, functions, also_after
        self.looked_up: list[str] = []

    def write(self, task: Task, default_backend: str | None) -> str:
        """The call that makes it, for a line that is indented twice; without the backend that it gets anyhow."""
        work = representative(task)
        arguments = list(self._arguments(work))
        common = list(self._common(task, default_backend))
        if not isinstance(task, ForEach):
            return write_call(type(task).__name__, [*arguments, *common], 2)
        make = f"lambda item, _: {write_call(type(work).__name__, arguments, 3)}"
        return write_call("ForEach", [self._value(task.items), make, *self._uses(task), *common], 2)

    def listed(self, tasks: Iterable[Task]) -> str:
        named = (self._variables.get(top_level(task).uid) for task in tasks)
        return f"[{', '.join(dict.fromkeys(name for name in named if name))}]"

    def look_up(self, variable: str) -> Code:
        self.looked_up.append(variable)
        return Code(f'os.environ["{variable}"]')

    def _arguments(self, task: Task) -> Iterator[str]:
        """Those that say what the task runs."""
        for field in _OWN_FIELDS[type(task)]:
            value = getattr(task, field)
            if value is None or (isinstance(value, tuple | list | dict) and not value):
                continue
            if field == "function":
                yield self._function(value)
                continue
            value = list(value) if isinstance(value, tuple) else self._without_secrets(value)
            code = self._value(value, in_text=field in _TEXT_FIELDS)
            yield code if field == "prompt" else f"{field}={code}"

    def _common(self, task: Task, default_backend: str | None) -> Iterator[str]:
        if task.name:
            yield f"name={task.name!r}"
        if task.backend and task.backend != default_backend:
            yield f"backend={task.backend!r}"
        if (after := self.listed([*task.after, *self._also_after.get(task.uid, ())])) != "[]":
            yield f"after={after}"
        for field, default in _FLOW_DEFAULTS.items():
            if (value := getattr(task, field)) != default:
                yield f"{field}={value!r}"

    def _uses(self, task: ForEach) -> Iterator[str]:
        """Of a list the made tasks say it themselves."""
        used = [one for one in task.needs() if task.source is not None and one is not task.source.task]
        if used:
            yield f"uses={self.listed(used)}"

    def _function(self, function: object) -> str:
        if isinstance(function, Source):
            return self._functions[function]
        if isinstance(function, Module):
            return f"Module({function.path!r})"
        raise TypeError(f"a {type(function).__name__} is neither source nor import path, so it cannot be written")

    # --- values

    def _value(self, value: object, *, in_text: bool = False) -> str:
        nothing = "'null'" if in_text else "None"

        def special(item: object) -> str | None:
            if isinstance(item, Text):
                return f"Text({', '.join(write_value(part, special) for part in item.parts)})"
            if isinstance(item, Task):
                return self._result(item, "") or nothing
            if isinstance(item, Part) and item.task == _ITEM.task:
                return f"text({_part_code(item.path)})" if in_text else _part_code(item.path)
            if isinstance(item, Part):
                return self._result(item.task, item.path) or nothing
            return _with_item(item) if isinstance(item, str) and _ITEM_MARK in item else None

        return write_value(value, special)

    def _result(self, task: Task, path: str) -> str | None:
        """What stands for a part of its result; None where it has no variable."""
        if isinstance(task.parent, ForEach):
            number = [child.uid for child in task.parent.children].index(task.uid)
            path = f"/{number}{path}"
        variable = self._variables.get(top_level(task).uid)
        return f"Part({variable}, {path!r})" if variable and path else variable

    def _without_secrets(self, value: Any) -> Any:
        """With a look-up in the place of each environment variable whose name looks secret."""
        if isinstance(value, list | tuple):
            return type(value)(self._without_secrets(item) for item in value)
        if not isinstance(value, dict):
            return value
        cleaned = {key: self._without_secrets(item) for key, item in value.items()}
        if isinstance(env := cleaned.get("env"), dict):
            secret = {name: self.look_up(name) for name, value in env.items() if value and looks_secret(name)}
            cleaned["env"] = env | secret
        return cleaned


def _part_code(path: str) -> str:
    return f"part(item, {path!r})" if path else "item"


def _with_item(text: str) -> str:
    """A text that holds the item, or parts of it."""
    codes = [
        f"text({_part_code(msgspec.json.decode(piece))})" if number % 2 else repr(piece)
        for number, piece in enumerate(_ITEM_IN_TEXT.split(text))
    ]
    return " + ".join(code for code in codes if code != "''")
