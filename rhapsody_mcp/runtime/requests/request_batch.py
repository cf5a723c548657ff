"""Makes the tasks of the requests of one call, all of them or none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter

from rhapsody_mcp.model.errors import InvalidTask, UnknownName, nearest
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.single_task import kind_of_request
from rhapsody_mcp.runtime.requests.task_builder import make_task
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.session.routing import NoBackend, route
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of

__all__ = ["label_of", "make_tasks"]

_NAMES_SHOWN = 20
_REFUSALS_SHOWN = 3
_TASK_ID = re.compile(r"task\.\d+(\[|$)")


def make_tasks(requests: Sequence[TaskRequest], session: OpenSession) -> list[Task]:
    """Tasks of `session`, in order, with the tasks that they refer to in the place of the references.

    Raises InvalidTask, which names the tasks, for the first requests that cannot be met, and LimitExceeded.
    """
    session.session.refuse_count(sum(_task_count(request) for request in requests))
    uids = session.new_uids(len(requests))
    batch = _RequestBatch(requests, uids, session)
    errors: dict[int, str] = {}
    for index in batch.order():
        if batch.needs[index] & errors.keys():
            errors[index] = ""  # told by what it needs
            continue
        try:
            with _naming_task(index, requests[index]):
                task = make_task(requests[index], uids[index], batch.task, session.functions.source)
                _set_backend(task, _route(requests[index], session))
                batch.tasks[index] = task
        except InvalidTask as error:
            errors[index] = str(error)
    _raise_errors([errors[index] for index in sorted(errors) if errors[index]])
    return [batch.tasks[index] for index in range(len(requests))]


def _task_count(request: TaskRequest) -> int:
    return len(request.for_each) if isinstance(request.for_each, list) else 1


def _raise_errors(wrong: Sequence[str]) -> None:
    if wrong:
        more = f" And {len(wrong) - _REFUSALS_SHOWN} more tasks are wrong." if len(wrong) > _REFUSALS_SHOWN else ""
        raise InvalidTask(" ".join(wrong[:_REFUSALS_SHOWN]) + more)


class _RequestBatch:
    """The requests of one call: who is named how, and who needs whom."""

    def __init__(self, requests: Sequence[TaskRequest], uids: Sequence[str], session: OpenSession) -> None:
        self.requests, self.session = requests, session
        self.tasks: dict[int, Task] = {}
        self._index = {uid: index for index, uid in enumerate(uids)}
        for index, request in enumerate(requests):
            with _naming_task(index, request):
                self._take_name(request.name, index)
        self.needs = {index: self._needs(index, request) for index, request in enumerate(requests)}

    def _take_name(self, name: str | None, index: int) -> None:
        if name is None:
            return
        if _TASK_ID.match(name):
            raise InvalidTask("names of this form are the ids that the server gives; give the task another name.")
        if (other := self._index.get(name)) is not None:
            raise InvalidTask(f"this is the name of tasks[{other}] of this call; give each its own.")
        if self.session.has_name(name):
            raise InvalidTask("this name is taken by another task of the session; give this one another name.")
        self._index[name] = index

    def order(self) -> list[int]:
        """Indices of the requests, each after those that it needs."""
        try:
            return list(TopologicalSorter(self.needs).static_order())
        except CycleError as error:
            circle = " needs ".join(label_of(index, self.requests[index]) for index in reversed(error.args[1]))
            raise InvalidTask(f"these tasks wait for each other in a circle: {circle}. Remove a reference.") from None

    def _needs(self, index: int, request: TaskRequest) -> set[int]:
        with _naming_task(index, request):
            names = request.references() | set(request.after or ())
            for name in names - (in_batch := {name for name in names if name in self._index}):
                if request.on_upstream_failure == "cancel":
                    _refuse_failed(self._session_task(name, index))
            if index in (needs := {self._index[name] for name in in_batch}):
                raise InvalidTask("it refers to its own result; refer to another task.")
        return needs

    def task(self, name: str) -> Task:
        """The task of this call or of an earlier one; those of this call have been made by now."""
        return self.tasks[self._index[name]] if name in self._index else self.session.task(name)

    def _session_task(self, name: str, index: int) -> Task:
        try:
            return self.session.task(name)
        except UnknownName as error:
            if error.valid:
                raise
            base, _, number = name.removesuffix("]").partition("[")
            if base in self._index and is_index(number):
                part = f'{{"ref": "{base}", "path": "/{number}"}}'
                raise InvalidTask(f"{name} is not there before {base} has started; refer to it as {part}.") from None
            known = self._valid_references(index)
            valid = ", ".join(known[:_NAMES_SHOWN]) or "no other task yet"
            more = f", and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
            raise InvalidTask(f"unknown task {name!r}{nearest(name, known)}. Valid: {valid}{more}.") from None

    def _valid_references(self, index: int) -> list[str]:
        """What the task of this index can refer to."""
        in_batch = [request.name for other, request in enumerate(self.requests) if request.name and other != index]
        failed = (TaskState.FAILED, TaskState.CANCELED)
        return in_batch + [name_of(task) for task in self.session.session.tasks if task.state not in failed]


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
        raise InvalidTask(f"{error} For a {error.kind}: create_session with {hint} in backends.") from None


def _set_backend(task: Task, backend: str) -> None:
    for each in (task, *(task.children if isinstance(task, ForEach) else ())):
        each.backend = backend


@contextmanager
def _naming_task(index: int, request: TaskRequest) -> Iterator[None]:
    """Every refusal says which task it is about."""
    try:
        yield
    except (InvalidTask, UnknownName) as error:
        raise InvalidTask(f"{label_of(index, request)}: {error}") from error


def label_of(index: int, request: TaskRequest) -> str:
    return f"tasks[{index}]" + (f" ({request.name!r})" if request.name else "")
