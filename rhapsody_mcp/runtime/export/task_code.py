"""Writes the Python code that makes a task."""

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
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Condition, ForEach, Part, Task, Text

__all__ = ["TaskCode", "representative", "top_level"]

_TEXT_FIELDS = {"prompt", "messages", "system_prompt", "model", "arguments", "outputs", "task_backend_specific_kwargs"}
_TASK_CLASSES: tuple[type[Task], ...] = (Task, ComputeTask, AITask)
_PARAMETERS = {kind: inspect.signature(kind).parameters for kind in _TASK_CLASSES}
_OWN_FIELDS = {
    kind: [name for name, field in parameters.items() if field.kind is not field.VAR_KEYWORD]
    for kind, parameters in _PARAMETERS.items()
}
"""By class, the fields that only this class of task has."""
_ATTRIBUTES = {"stdout": "stdout_form"}
"""The attributes that do not have the names of their parameters: `task.stdout` is what it printed."""
_FLOW_DEFAULTS = {
    name: _PARAMETERS[Task][name].default for name in ("retries", "retry_delay_s", "on_upstream_failure", "priority")
}
_ITEM_MARK = f"<{secrets.token_hex(8)}>"
_ITEM = Part(cast(Task, _ITEM_MARK))
"""The item, while the code of a ForEach is written. A text holds the JSON form of the item or of a Part of it."""
_ITEM_IN_TEXT = re.compile(rf'\{{"task":"{_ITEM_MARK}","path":("(?:[^"\\]|\\.)*")\}}')


def representative(task: Task) -> Task:
    """The task, or the task that a ForEach makes for a placeholder of the item."""
    return task.make(_ITEM, 0) if isinstance(task, ForEach) else task


def top_level(task: Task) -> Task:
    """The task that a script submits: for a child of a ForEach, the ForEach."""
    return task.parent or task


class TaskCode:
    """Writes the code of tasks, given the variable of each task by uid, and the expression of each source.

    A task without a variable is left out, and None is written for its result. `also_after` are further tasks that a
    task comes after, by its uid. `looked_up` are the environment variables that replace secrets.
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
        """The call that makes a task, for a line of depth 2. The default backend is not written."""
        work = representative(task)
        arguments = list(self._arguments(work))
        if work.when is not None and work is not task:
            arguments.append(f"when={self._condition(work.when)}")
        common = list(self._common(task, default_backend))
        if not isinstance(task, ForEach):
            return write_call(type(task).__name__, [*arguments, *common], 2)
        make = f"lambda item, _: {write_call(type(work).__name__, arguments, 3)}"
        return write_call("ForEach", [self._value(task.items), make, *self._uses(task), *common], 2)

    def write_list(self, tasks: Iterable[Task]) -> str:
        named = (self._variables.get(top_level(task).uid) for task in tasks)
        return f"[{', '.join(dict.fromkeys(name for name in named if name))}]"

    def look_up(self, variable: str) -> Code:
        self.looked_up.append(variable)
        return Code(f'os.environ["{variable}"]')

    def _arguments(self, task: Task) -> Iterator[str]:
        """The arguments that say what the task runs."""
        for field in _OWN_FIELDS[type(task)]:
            value = getattr(task, _ATTRIBUTES.get(field, field))
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
        if (after := self.write_list([*task.after, *self._also_after.get(task.uid, ())])) != "[]":
            yield f"after={after}"
        for field, default in _FLOW_DEFAULTS.items():
            if (value := getattr(task, field)) != default:
                yield f"{field}={value!r}"

        if task.when is not None:
            yield f"when={self._condition(task.when)}"

    def _condition(self, when: Condition) -> str:
        if when.source is not None:
            value = self._result(when.source, when.path) or "None"
            arguments = [value]
        else:
            arguments = ["item", repr(when.path)] if when.path else ["item"]
        tests = msgspec.to_builtins(when.comparison).items()
        arguments += [f"{name}={self._value(part)}" for name, part in tests]
        return f"Condition({', '.join(arguments)})"

    def _uses(self, task: ForEach) -> Iterator[str]:
        """The argument `uses`. Where the items are a list, the children name the tasks that they use."""
        used = [need for need in task.needs() if task.source is not None and need is not task.source.task]
        if used:
            yield f"uses={self.write_list(used)}"

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
        """The expression for a part of a task's result; None for a task without a variable."""
        if isinstance(task.parent, ForEach):
            number = [child.uid for child in task.parent.children].index(task.uid)
            path = f"/{number}{path}"
        variable = self._variables.get(top_level(task).uid)
        return f"Part({variable}, {path!r})" if variable and path else variable

    def _without_secrets(self, value: Any) -> Any:
        """The value with a look-up in the place of each environment variable whose name suggests a secret."""
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
    """The expression for a text that holds the item or parts of the item."""
    codes = [
        f"text({_part_code(msgspec.json.decode(piece))})" if number % 2 else repr(piece)
        for number, piece in enumerate(_ITEM_IN_TEXT.split(text))
    ]
    return " + ".join(code for code in codes if code != "''")
