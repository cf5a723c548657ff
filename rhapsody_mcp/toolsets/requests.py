"""Reads the tasks that an agent submits, and makes runtime tasks of them, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rhapsody_mcp.model.errors import InvalidTask, UnknownName, nearest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.encoding import Module, Source
from rhapsody_mcp.runtime.open_sessions import OpenSession
from rhapsody_mcp.runtime.references import names_in, resolve
from rhapsody_mcp.runtime.session import kind_of
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Part, Task

__all__ = ["RankGroup", "TaskRequest", "label_of", "make_tasks"]

_NAMES_SHOWN = 20


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RankGroup(_Closed):
    """Ranks of a job that are started alike."""

    ranks: Annotated[int, Field(ge=1, description="Processes in this group.")]
    env: Annotated[dict[str, str] | None, Field(description="Environment variables to set.")] = None
    cwd: Annotated[str | None, Field(description="Working directory.")] = None
    policy: Annotated[
        dict[str, Any] | None,
        Field(description='Placement: host_name, cpu_affinity, gpu_affinity, e.g. {"gpu_affinity": [0]}.'),
    ] = None

    @property
    def template(self) -> dict[str, Any]:
        return self.model_dump(exclude={"ranks"}, exclude_none=True)


class TaskRequest(_Closed):
    """One task. Exactly one of source, function, executable and prompt says what it runs."""

    name: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$",
            description='How references and later calls name it, e.g. "train".',
        ),
    ] = None
    source: Annotated[
        str | None,
        Field(
            description='Python source of a function; imports go inside it, e.g. "def add(a, b):\\n    return a + b".'
        ),
    ] = None
    entry: Annotated[str | None, Field(description="Function of source to call; default is its last one.")] = None
    function: Annotated[str | None, Field(description='Function to import where the task runs, e.g. "math:sqrt".')] = (
        None
    )
    args: Annotated[
        list[Any] | None,
        Field(description='Positional arguments of source or function, e.g. [2, {"ref": "samples"}].'),
    ] = None
    kwargs: Annotated[
        dict[str, Any] | None, Field(description='Keyword arguments of source or function, e.g. {"steps": 100}.')
    ] = None
    executable: Annotated[
        str | None, Field(description='Program: a path, or a name on PATH, e.g. "/bin/hostname".')
    ] = None
    arguments: Annotated[
        list[Any] | None, Field(description='Arguments of executable: texts, numbers, references, e.g. ["-n", 4].')
    ] = None
    prompt: Annotated[
        str | list[Any] | dict[str, Any] | None,
        Field(description="Text for the language model, a list of texts (the result is a list), or a reference."),
    ] = None
    system_prompt: Annotated[str | None, Field(description="Instructions that come before prompt.")] = None
    model: Annotated[str | None, Field(description="A model that the backend serves; default is its own.")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="For prompt: randomness, 0 to 2.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="For prompt: most tokens of one answer.")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="For prompt: nucleus sampling, 0 to 1.")] = None
    top_k: Annotated[int | None, Field(ge=-1, description="For prompt: candidate tokens; -1 for all.")] = None
    stop_sequences: Annotated[
        list[str] | None, Field(description="For prompt: texts that end an answer and are not part of it.")
    ] = None
    backend: Annotated[str | None, Field(description="Backend to run it; default is the session's first that can.")] = (
        None
    )
    process: Annotated[bool, Field(description="true gives a function a process of its own.")] = False
    ranks: Annotated[
        int | None,
        Field(
            ge=1, description="Run it as a job of this many processes, each with RHAPSODY_RANK and RHAPSODY_RANKS set."
        ),
    ] = None
    mpi: Annotated[
        bool, Field(description="true lets the ranks speak MPI to each other; else they run independently.")
    ] = False
    process_templates: Annotated[
        list[RankGroup] | None,
        Field(description='A job whose processes differ, e.g. [{"ranks": 2}, {"ranks": 1, "env": {"ROLE": "head"}}].'),
    ] = None
    env: Annotated[
        dict[str, str] | None,
        Field(description='Environment variables, e.g. {"OMP_NUM_THREADS": "1"}; gives a process of its own.'),
    ] = None
    cwd: Annotated[str | None, Field(description="Working directory; gives a process of its own.")] = None
    timeout_s: Annotated[float | None, Field(gt=0, description="FAILED after this many seconds of running.")] = None

    def given(self) -> set[str]:
        """The fields that say something."""
        return {field for field in self.model_fields_set if getattr(self, field) not in (None, False)}

    def references(self) -> set[str]:
        """The names of the tasks whose results this one needs."""
        return set(names_in([self.args or [], self.kwargs or {}, self.arguments or [], self.prompt]))


_EVERYWHERE = {"name", "backend", "timeout_s"}
_PROCESSES = {"process", "ranks", "mpi", "process_templates", "env", "cwd"}
_FIELDS = {
    "source": {"source", "entry", "args", "kwargs", *_PROCESSES, *_EVERYWHERE},
    "function": {"function", "args", "kwargs", *_PROCESSES, *_EVERYWHERE},
    "executable": {"executable", "arguments", *_PROCESSES, *_EVERYWHERE},
    "prompt": {
        *("prompt", "system_prompt", "model", "temperature", "max_tokens", "top_p", "top_k", "stop_sequences"),
        *_EVERYWHERE,
    },
}
"""Which fields a task has, by the one that says what it runs."""


def make_tasks(requests: Sequence[TaskRequest], session: OpenSession) -> list[Task]:
    """Tasks of `session`, in order, with the tasks that they refer to in the place of the references.

    Raises InvalidTask, which names the task, for the first request that cannot be met.
    """
    uids = session.new_uids(len(requests))
    made = _Batch(requests, uids, session)
    for index in made.order():
        with _named(index, requests[index]):
            made.tasks[index] = _make_task(requests[index], uids[index], made.task)
            _refuse_without_backend(made.tasks[index], session)
    return [made.tasks[index] for index in range(len(requests))]


class _Batch:
    """The requests of one call: who is named how, and who needs whom."""

    def __init__(self, requests: Sequence[TaskRequest], uids: Sequence[str], session: OpenSession) -> None:
        self.requests, self.session = requests, session
        self.tasks: dict[int, Task] = {}
        self._index = {uid: index for index, uid in enumerate(uids)}
        for index, request in enumerate(requests):
            with _named(index, request):
                self._take_name(request.name, index)

    def _take_name(self, name: str | None, index: int) -> None:
        if name is None:
            return
        if name in self._index or self.session.has_name(name):
            raise InvalidTask("this name is taken by another task of the session; give this one another name.")
        self._index[name] = index

    def order(self) -> list[int]:
        """Indices of the requests, each after those that it needs."""
        needs = {index: self._needs(index, request) for index, request in enumerate(self.requests)}
        try:
            return list(TopologicalSorter(needs).static_order())
        except CycleError as error:
            circle = " needs ".join(label_of(index, self.requests[index]) for index in reversed(error.args[1]))
            raise InvalidTask(f"these tasks wait for each other in a circle: {circle}. Remove a reference.") from None

    def _needs(self, index: int, request: TaskRequest) -> set[int]:
        with _named(index, request):
            names = request.references()
            for name in names - self._index.keys():
                _refuse_failed(self._earlier(name, index))
            if index in (needs := {self._index[name] for name in names & self._index.keys()}):
                raise InvalidTask("it refers to its own result; refer to another task.")
        return needs

    def task(self, name: str) -> Task:
        """The task of this call or of an earlier one; those of this call have been made by now."""
        return self.tasks[self._index[name]] if name in self._index else self.session.task(name)

    def _earlier(self, name: str, index: int) -> Task:
        try:
            return self.session.task(name)
        except UnknownName:
            known = self._others(index)
            valid = ", ".join(known[:_NAMES_SHOWN]) or "no other task yet"
            more = f", and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
            raise InvalidTask(f"unknown task {name!r}{nearest(name, known)}. Valid: {valid}{more}.") from None

    def _others(self, index: int) -> list[str]:
        """What the task of this index can refer to."""
        here = [request.name for at, request in enumerate(self.requests) if request.name and at != index]
        lost = (TaskState.FAILED, TaskState.CANCELED)
        return here + [task.name or task.uid for task in self.session.session.tasks if task.state not in lost]


def _refuse_failed(task: Task) -> None:
    if task.state in (TaskState.FAILED, TaskState.CANCELED):
        raise InvalidTask(
            f"it needs the result of {task.name or task.uid}, which ended {task.state}; submit that one again first."
        )


def _refuse_without_backend(task: Task, session: OpenSession) -> None:
    kind, backends = kind_of(task), session.session.backends
    names = [backend.name for backend in backends]
    able = [backend.name for backend in backends if kind in backend.kinds]
    hint = "vllm or endpoint" if kind == "prompt" else "dragon or local"
    if task.backend is not None and task.backend not in names:
        near = nearest(task.backend, names)
        wrong = f"unknown backend {task.backend!r}{near}. Valid: {', '.join(names)}."
    elif not able:
        wrong = f"no backend of this session runs a {kind} ({', '.join(names)})."
    elif task.backend is not None and task.backend not in able:
        raise InvalidTask(f"backend {task.backend!r} runs no {kind}. Valid: {', '.join(able)}.")
    else:
        return
    raise InvalidTask(wrong if able else f"{wrong} For a {kind}: create_session with {hint} in backends.")


def _make_task(request: TaskRequest, uid: str, task_named: Any) -> Task:
    kind = _kind(request)
    common: dict[str, Any] = {"uid": uid, "name": request.name, "backend": request.backend}
    layout = {"timeout": request.timeout_s} if request.timeout_s is not None else {}
    if kind == "prompt":
        sampling = {field: getattr(request, field) for field in _FIELDS["prompt"] - {"prompt"} - _EVERYWHERE}
        prompt = resolve(request.prompt, task_named)
        return AITask(prompt, **sampling, **common, task_backend_specific_kwargs=layout)
    layout |= _layout(request)
    if kind == "executable":
        arguments = [_argument(argument) for argument in resolve(request.arguments or [], task_named)]
        return ComputeTask(
            executable=request.executable, arguments=arguments, **common, task_backend_specific_kwargs=layout
        )
    function = (
        Module(request.function or "") if kind == "function" else Source(request.source or "", request.entry or "")
    )
    args, kwargs = resolve(request.args or [], task_named), resolve(request.kwargs or {}, task_named)
    return ComputeTask(function, args=args, kwargs=kwargs, **common, task_backend_specific_kwargs=layout)


def _kind(request: TaskRequest) -> str:
    given = request.given()
    kinds = [kind for kind in _FIELDS if kind in given]
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else "it has none"
        raise InvalidTask(f"a task runs exactly one of {', '.join(_FIELDS)}; {found}.")
    if idle := sorted(given - _FIELDS[kinds[0]]):
        valid = ", ".join(sorted(_FIELDS[kinds[0]]))
        raise InvalidTask(f"{idle[0]} has no effect on a task with {kinds[0]}. Valid there: {valid}.")
    return kinds[0]


def _layout(request: TaskRequest) -> dict[str, Any]:
    """The processes that are asked for, in the words of `task_backend_specific_kwargs`."""
    template = {key: value for key in ("env", "cwd") if (value := getattr(request, key)) is not None}
    if request.process_templates is not None:
        if clash := sorted({"ranks", "mpi", "process", "env", "cwd"} & request.given()):
            raise InvalidTask(f"process_templates and {clash[0]} contradict each other; give one of them.")
        return {"process_templates": [(group.ranks, group.template) for group in request.process_templates]}
    if request.mpi:
        if request.ranks is None:
            raise InvalidTask("mpi needs ranks, the number of processes, as in 4.")
        return {"type": "mpi", "ranks": request.ranks, "process_template": template}
    if request.ranks is not None:
        return {"process_templates": [(request.ranks, template)]}
    return {"process_template": template} if template or request.process else {}


def _argument(value: Any) -> str | Task | Part:
    if isinstance(value, Task | Part):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidTask(f"{value!r} among arguments is a {type(value).__name__}; a program takes texts and numbers.")
    return str(value)


@contextmanager
def _named(index: int, request: TaskRequest) -> Iterator[None]:
    """Every refusal says which task it is about."""
    try:
        yield
    except (InvalidTask, UnknownName) as error:
        raise InvalidTask(f"{label_of(index, request)}: {error}") from error


def label_of(index: int, request: TaskRequest) -> str:
    return f"tasks[{index}]" + (f" ({request.name!r})" if request.name else "")
