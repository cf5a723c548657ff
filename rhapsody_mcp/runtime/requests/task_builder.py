"""Makes runtime tasks of what an agent submits, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from typing import Any

from rhapsody_mcp.backends.base import Kind
from rhapsody_mcp.model.errors import InvalidTask, UnknownName, nearest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.dataflow.item_template import as_text, holds_item, with_item
from rhapsody_mcp.runtime.dataflow.references import is_literal, resolve, with_parts
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.task_request import EVERYWHERE, FIELDS, IN_TEXTS, STANDING, TaskRequest, is_stand_in
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.session.routing import NoBackend, route
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, ForEach, Part, Task, Text, name_of

__all__ = ["ItemMaker", "kind_of_request", "label_of", "make_task", "make_tasks"]

_NAMES_SHOWN = 20
_REFUSALS_SHOWN = 3
_ID = re.compile(r"task\.\d+(\[|$)")
TaskNamed = Callable[[str], Task]
FunctionNamed = Callable[[str], Source]


def make_tasks(requests: Sequence[TaskRequest], session: OpenSession) -> list[Task]:
    """Tasks of `session`, in order, with the tasks that they refer to in the place of the references.

    Raises InvalidTask, which names the tasks, for the first requests that cannot be met, and LimitExceeded.
    """
    session.session.refuse_count(sum(_count(request) for request in requests))
    uids = session.new_uids(len(requests))
    made = _Batch(requests, uids, session)
    wrong: dict[int, str] = {}
    for index in made.order():
        if made.needs[index] & wrong.keys():
            wrong[index] = ""  # told by what it needs
            continue
        try:
            with _named(index, requests[index]):
                task = make_task(requests[index], uids[index], made.task, session.functions.source)
                _set_backend(task, _route(requests[index], session))
                made.tasks[index] = task
        except InvalidTask as error:
            wrong[index] = str(error)
    _refuse_all([wrong[index] for index in sorted(wrong) if wrong[index]])
    return [made.tasks[index] for index in range(len(requests))]


def _count(request: TaskRequest) -> int:
    return len(request.for_each) if isinstance(request.for_each, list) else 1


def _refuse_all(wrong: Sequence[str]) -> None:
    if wrong:
        more = f" And {len(wrong) - _REFUSALS_SHOWN} more tasks are wrong." if len(wrong) > _REFUSALS_SHOWN else ""
        raise InvalidTask(" ".join(wrong[:_REFUSALS_SHOWN]) + more)


class _Batch:
    """The requests of one call: who is named how, and who needs whom."""

    def __init__(self, requests: Sequence[TaskRequest], uids: Sequence[str], session: OpenSession) -> None:
        self.requests, self.session = requests, session
        self.tasks: dict[int, Task] = {}
        self._index = {uid: index for index, uid in enumerate(uids)}
        for index, request in enumerate(requests):
            with _named(index, request):
                self._take_name(request.name, index)
        self.needs = {index: self._needs(index, request) for index, request in enumerate(requests)}

    def _take_name(self, name: str | None, index: int) -> None:
        if name is None:
            return
        if _ID.match(name):
            raise InvalidTask(
                "names of this form are the ids that the server gives; give the task another name.", field="name"
            )
        if (other := self._index.get(name)) is not None:
            raise InvalidTask(f"this is the name of tasks[{other}] of this call; give each its own.", field="name")
        if self.session.has_name(name):
            raise InvalidTask(
                "this name is taken by another task of the session; give this one another name.", field="name"
            )
        self._index[name] = index

    def order(self) -> list[int]:
        """Indices of the requests, each after those that it needs."""
        try:
            return list(TopologicalSorter(self.needs).static_order())
        except CycleError as error:
            circle = " needs ".join(label_of(index, self.requests[index]) for index in reversed(error.args[1]))
            raise InvalidTask(f"these tasks wait for each other in a circle: {circle}. Remove a reference.") from None

    def _needs(self, index: int, request: TaskRequest) -> set[int]:
        with _named(index, request):
            names = request.references() | set(request.after or ())
            for name in names - (here := {name for name in names if name in self._index}):
                if request.on_upstream_failure == "cancel":
                    _refuse_failed(self._earlier(name, index))
            if index in (needs := {self._index[name] for name in here}):
                raise InvalidTask("it refers to its own result; refer to another task.")
        return needs

    def task(self, name: str) -> Task:
        """The task of this call or of an earlier one; those of this call have been made by now."""
        return self.tasks[self._index[name]] if name in self._index else self.session.task(name)

    def _earlier(self, name: str, index: int) -> Task:
        try:
            return self.session.task(name)
        except UnknownName as error:
            if error.valid:
                raise
            base, _, number = name.removesuffix("]").partition("[")
            if base in self._index and is_index(number):
                part = f'{{"ref": "{base}", "path": "/{number}"}}'
                raise InvalidTask(f"{name} is not there before {base} has started; refer to it as {part}.") from None
            known = self._others(index)
            valid = ", ".join(known[:_NAMES_SHOWN]) or "no other task yet"
            more = f", and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
            raise InvalidTask(f"unknown task {name!r}{nearest(name, known)}. Valid: {valid}{more}.") from None

    def _others(self, index: int) -> list[str]:
        """What the task of this index can refer to."""
        here = [request.name for at, request in enumerate(self.requests) if request.name and at != index]
        lost = (TaskState.FAILED, TaskState.CANCELED)
        return here + [name_of(task) for task in self.session.session.tasks if task.state not in lost]


def _refuse_failed(task: Task) -> None:
    if task.state in (TaskState.FAILED, TaskState.CANCELED):
        raise InvalidTask(
            f"it needs the result of {name_of(task)}, which ended {task.state}; submit that one again first."
        )


def _route(request: TaskRequest, session: OpenSession) -> str:
    backends = {backend.name: backend for backend in session.session.backends}
    try:
        return route(kind_of_request(request), request.backend, backends)
    except NoBackend as error:
        hint = "vllm or endpoint" if error.kind == "prompt" else "dragon or local"
        raise InvalidTask(
            f"{error} For a {error.kind}: create_session with {hint} in backends.", field="backend"
        ) from None


def _set_backend(task: Task, backend: str) -> None:
    for one in (task, *(task.children if isinstance(task, ForEach) else ())):
        one.backend = backend


def make_task(request: TaskRequest, uid: str, task_named: TaskNamed, function_named: FunctionNamed) -> Task:
    """Raises InvalidTask."""
    flow: dict[str, Any] = {
        "uid": uid,
        "name": request.name,
        "backend": request.backend,
        "after": [task_named(name) for name in request.after or ()],
        "retries": request.retries,
        "retry_delay_s": request.retry_delay_s,
        "on_upstream_failure": request.on_upstream_failure,
    }
    if request.for_each is None:
        fields, form = _fields(request), _form(request)
        if any(_holds_item(field, value) for field in _PLACES if (value := fields[field]) is not None):
            raise InvalidTask(
                '{item} and {"item": true} stand for an item of for_each, which is not given; what is data goes in as '
                '{"literal": ...}.'
            )
        return _make_work(form, fields, _kwargs(form, fields), task_named, _function(request, function_named), flow)
    uses = [task_named(name) for name in request.model_copy(update={"for_each": None}).references()]
    maker = ItemMaker(request, task_named, _function(request, function_named))
    return ForEach(_items(request, task_named), maker, uses=uses, **flow)


class ItemMaker:
    """Makes the task for one item of a for_each; `request` is what was asked for."""

    def __init__(self, request: TaskRequest, task_named: TaskNamed, function: Source | Module | None) -> None:
        self.request = request.model_copy(update={"for_each": None})
        self._task_named, self._function = task_named, function
        self._form, self._fields = _form(self.request), _fields(self.request)
        self._places = {
            field: value
            for field in _PLACES
            if (value := self._fields[field]) is not None and (field not in STANDING or _holds_item(field, value))
        }
        if not isinstance(request.for_each, int) and not any(_holds_item(*place) for place in self._places.items()):
            raise InvalidTask(
                'for_each is given, and nothing stands for the item. Put {"item": true} into args, kwargs, arguments, '
                "prompt or a field of its sampling, or {item} into a text there.",
                field="for_each",
            )
        if request.process_templates and holds_item([group.template for group in request.process_templates]):
            raise InvalidTask(
                "process_templates hold no {item}; give the task ranks, env and cwd.", field="process_templates"
            )
        self._kwargs = None if {"env", "cwd"} & self._places.keys() else _kwargs(self._form, self._fields)

    def __call__(self, item: Any, number: int) -> ComputeTask | AITask:
        places = {field: with_item(value, item) for field, value in self._places.items()}
        for field in ("arguments", "prompt", "system_prompt"):
            if field in places:
                places[field] = _told(places[field])
        if "messages" in places:
            places["messages"] = _joined(places["messages"])
        fields = {**self._fields, **places}
        kwargs = _kwargs(self._form, fields) if self._kwargs is None else self._kwargs
        return _make_work(self._form, fields, kwargs, self._task_named, self._function, {})


def _fields(request: TaskRequest) -> dict[str, Any]:
    """With the references in texts apart from what an item may bring into them."""
    fields = dict(request)
    return fields | {field: with_parts(value) for field in IN_TEXTS if (value := fields[field]) is not None}


def _joined(messages: Sequence[Any]) -> list[Any]:
    """With the messages of an item, which may be one or a list of them, in the place of what stands for it."""
    joined: list[Any] = []
    for message in messages:
        if not is_literal(message):
            joined.append(_told(message))
        elif isinstance(message["literal"], list):
            joined += [{"literal": one} for one in message["literal"]]
        else:
            joined.append(message)
    return joined


def _told(value: Any) -> Any:
    """Items as texts, where a program or a model gets them."""
    if isinstance(value, list):
        return [_told(part) for part in value]
    if not isinstance(value, dict):
        return value
    if not is_literal(value):
        return {key: _told(part) for key, part in value.items()}
    item = value["literal"]
    return value if isinstance(item, Task | Part) else as_text(item)


def _holds_item(field: str, value: Any) -> bool:
    """Only as a whole a JSON schema stands for an item: it may have a property of that name."""
    if field == "json_schema":
        return is_stand_in(value) and "item" in value
    return holds_item(value)


_OF_A_MODEL = FIELDS["prompt"] - EVERYWHERE | {"messages"}
_PLACES = (
    *("args", "kwargs", "executable", "arguments", "prompt", "messages", "system_prompt", "env", "cwd"),
    *STANDING,
)
"""Where an item may stand."""


def _items(request: TaskRequest, task_named: TaskNamed) -> Any:
    if isinstance(request.for_each, int):
        return list(range(request.for_each))
    items = resolve(request.for_each, task_named)
    if not isinstance(items, list | Task | Part):
        raise InvalidTask('for_each is a list, or a reference to one, as in {"ref": "samples"}.', field="for_each")
    return items


def _make_work(
    form: str,
    fields: Mapping[str, Any],
    asked: Mapping[str, Any],
    task_named: TaskNamed,
    function: Source | Module | None,
    flow: Mapping[str, Any],
) -> ComputeTask | AITask:
    """`fields` are those of a request, with an item in its places, and `asked` what the backend is told."""
    if form in ("prompt", "messages"):
        asked_for = ((field, value) for field in _OF_A_MODEL if (value := fields[field]) is not None)
        given = {field: _resolved(field, value, task_named) for field, value in asked_for}
        return AITask(**given, **flow, task_backend_specific_kwargs=asked)
    if form == "executable":
        arguments = [_argument(argument) for argument in resolve(fields["arguments"] or [], task_named)]
        return ComputeTask(
            executable=fields["executable"], arguments=arguments, **flow, task_backend_specific_kwargs=asked
        )
    args, kwargs = resolve(fields["args"] or [], task_named), resolve(fields["kwargs"] or {}, task_named)
    if not isinstance(kwargs, dict | Task | Part):
        raise InvalidTask(f"kwargs is an object with the function's arguments by name, not {kwargs!r}.", field="kwargs")
    return ComputeTask(function, args=args, kwargs=kwargs, **flow, task_backend_specific_kwargs=asked)


def _resolved(field: str, value: Any, task_named: TaskNamed) -> Any:
    stands = is_stand_in(value) or is_literal(value)
    return resolve(value, task_named) if field in IN_TEXTS or (field in STANDING and stands) else value


def _function(request: TaskRequest, function_named: FunctionNamed) -> Source | Module | None:
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
    return _KINDS[_form(request)]


def _form(request: TaskRequest) -> str:
    """The one field that says what it runs."""
    given = request.given()
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


def _kwargs(form: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The time and the processes that are asked for, in the words of `task_backend_specific_kwargs`."""
    timeout = {"timeout": fields["timeout_s"]} if fields["timeout_s"] is not None else {}
    return timeout if form in ("prompt", "messages") else {**timeout, **_layout(fields)}


def _layout(fields: Mapping[str, Any]) -> dict[str, Any]:
    template = {key: value for key in ("env", "cwd") if (value := fields[key]) is not None}
    ranks, groups = fields["ranks"], fields["process_templates"]
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
        return {"process_templates": [(group.ranks, group.template) for group in groups]}
    if fields["mpi"]:
        if ranks is None:
            raise InvalidTask("mpi needs ranks, the number of processes, as in 4.", field="mpi")
        return {"type": "mpi", "ranks": ranks, "process_template": template}
    if ranks is not None:
        return {"process_templates": [(ranks, template)]}
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


@contextmanager
def _named(index: int, request: TaskRequest) -> Iterator[None]:
    """Every refusal says which task it is about."""
    try:
        yield
    except InvalidTask as error:
        raise error.of_task(label_of(index, request)) from error
    except UnknownName as error:
        raise InvalidTask(f"{label_of(index, request)}: {error}", field=error.field) from error


def label_of(index: int, request: TaskRequest) -> str:
    return f"tasks[{index}]" + (f" ({request.name!r})" if request.name else "")
