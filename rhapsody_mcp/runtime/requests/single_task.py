"""Makes a task that runs one function, program or prompt, from the fields of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rhapsody_mcp.backends.base import Kind
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.dataflow.references import is_literal, parse_texts, resolve
from rhapsody_mcp.runtime.requests.task_request import (
    COMMON_FIELDS,
    COMPARISONS,
    FIELDS,
    STAND_IN_FIELDS,
    TEXT_FIELDS,
    TaskRequest,
    is_stand_in,
)
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Condition, Part, Task, Text

__all__ = [
    *("FunctionNamed", "TaskNamed", "backend_kwargs", "fields_of", "form_of", "function_of", "kind_of_request"),
    "condition_of",
    "make_single_task",
]

TaskNamed = Callable[[str], Task]
FunctionNamed = Callable[[str], Source]
_PROMPT_FIELDS = FIELDS["prompt"] - COMMON_FIELDS | {"messages"}


def make_single_task(
    form: str,
    fields: Mapping[str, Any],
    specific_kwargs: Mapping[str, Any],
    task_named: TaskNamed,
    function: Source | Module | None,
    common: Mapping[str, Any],
) -> ComputeTask | AITask:
    """A task of the given form. `fields` have an item in the place of each placeholder. Raises InvalidTask."""
    if form in ("prompt", "messages"):
        present = ((field, value) for field in _PROMPT_FIELDS if (value := fields[field]) is not None)
        parameters = {field: _resolved(field, value, task_named) for field, value in present}
        return AITask(**parameters, **common, task_backend_specific_kwargs=specific_kwargs)
    common = {**common, "outputs": fields["outputs"] or (), "task_backend_specific_kwargs": specific_kwargs}
    if form == "executable":
        arguments = [_argument(argument) for argument in resolve(fields["arguments"] or [], task_named)]
        return ComputeTask(executable=fields["executable"], arguments=arguments, stdout=fields["stdout"], **common)
    args, kwargs = resolve(fields["args"] or [], task_named), resolve(fields["kwargs"] or {}, task_named)
    if not isinstance(kwargs, dict | Task | Part):
        raise InvalidTask(f"kwargs is an object with the function's arguments by name, not {kwargs!r}.", field="kwargs")
    return ComputeTask(function, args=args, kwargs=kwargs, **common)


def _resolved(field: str, value: Any, task_named: TaskNamed) -> Any:
    stands = is_stand_in(value) or is_literal(value)
    return resolve(value, task_named) if field in TEXT_FIELDS or (field in STAND_IN_FIELDS and stands) else value


def condition_of(when: Mapping[str, Any], value: Any) -> Condition:
    """The condition on a value, with the path and the comparisons of `when`. Raises InvalidTask."""
    path = when.get("path") or ""
    if not isinstance(path, str):
        raise InvalidTask(f"path is {path!r}; valid is a JSON Pointer, as in '/accuracy'.", field="when")
    nulls = [key for key in ("above", "below", "exists") if key in when and when[key] is None]
    if nulls:
        raise InvalidTask(f"{nulls[0]} is null in when; leave it out.", field="when")
    return Condition(value, path, **{key: part for key, part in when.items() if key in COMPARISONS})


def function_of(request: TaskRequest, function_named: FunctionNamed) -> Source | Module | None:
    if request.source is not None:
        return Source(request.source, request.entry or "")
    if request.function is None:
        return None
    return Module(request.function) if ":" in request.function else function_named(request.function)


_KINDS: dict[str, Kind] = {
    "source": "function",
    "function": "function",
    "executable": "executable",
    "prompt": "prompt",
    "messages": "prompt",
}


def kind_of_request(request: TaskRequest) -> Kind:
    return _KINDS[form_of(request)]


def form_of(request: TaskRequest) -> str:
    """The one field that says what the task runs. Raises InvalidTask for none or several, and for unused fields."""
    given = request.given_fields()
    kinds = [kind for kind in FIELDS if kind in given]
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else "it has none"
        raise InvalidTask(f"a task runs exactly one of {', '.join(FIELDS)}; {found}.")
    if idle := sorted(given - FIELDS[kinds[0]]):
        kind = " or ".join(kind for kind, fields in FIELDS.items() if idle[0] in fields)
        raise InvalidTask(
            f"{idle[0]} has no effect on a task with {kinds[0]}; it belongs to one with {kind}.", field=idle[0]
        )
    return kinds[0]


def backend_kwargs(form: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `task_backend_specific_kwargs` for the timeout and the processes of a request."""
    timeout = {"timeout": fields["timeout_s"]} if fields["timeout_s"] is not None else {}
    if form in ("prompt", "messages"):
        return timeout
    others = {field: value for field in _OTHERS if (value := fields[field]) is not None}
    return {**timeout, **_layout(fields), **others}


_OTHERS = ("cores", "gpus", "memory_gb", "python", "packages", "container", "setup")


def _layout(fields: Mapping[str, Any]) -> dict[str, Any]:
    template = {key: value for key in ("env", "cwd") if (value := fields[key]) is not None}
    ranks, groups = fields["ranks"], fields["process_templates"]
    most = {"ranks_per_node": fields["ranks_per_node"]} if fields["ranks_per_node"] is not None else {}
    if groups is not None:
        others = ("cwd", "env", "mpi", "process", "ranks")
        if clash := [key for key in others if fields[key] is not None and fields[key] is not False]:
            raise InvalidTask(
                f"process_templates and {clash[0]} contradict each other; give one of them.", field="process_templates"
            )
        if not groups:
            raise InvalidTask(
                'process_templates is empty; give at least one group, as in [{"ranks": 2}].', field="process_templates"
            )
        return {"process_templates": [(group.ranks, group.template) for group in groups], **most}
    if fields["mpi"]:
        if ranks is None:
            raise InvalidTask("mpi needs ranks, the number of processes, as in 4.", field="mpi")
        return {"type": "mpi", "ranks": ranks, "process_template": template, **most}
    if ranks is not None:
        return {"process_templates": [(ranks, template)], **most}
    if most:
        raise InvalidTask(
            "ranks_per_node needs ranks, the number of processes, as in 4, or process_templates.",
            field="ranks_per_node",
        )
    return {"process_template": template} if template or fields["process"] else {}


def _argument(value: Any) -> str | Task | Part | Text:
    if isinstance(value, Task | Part | Text):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidTask(
            f"{value!r} among arguments is a {type(value).__name__}; a program takes texts and numbers.",
            field="arguments",
        )
    return str(value)


def fields_of(request: TaskRequest) -> dict[str, Any]:
    """The fields of a request. Texts are parsed now, so that nothing in an item is read as a reference."""
    fields = dict(request)
    return fields | {field: parse_texts(value) for field in TEXT_FIELDS if (value := fields[field]) is not None}
