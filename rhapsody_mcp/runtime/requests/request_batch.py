"""Makes the tasks of the requests of one call, all of them or none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.errors import InvalidTask, UnknownName, nearest
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.single_task import kind_of_request
from rhapsody_mcp.runtime.requests.task_builder import make_task
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.session.routing import NoBackend, route
from rhapsody_mcp.runtime.tasks import ForEach, Task, child_named, name_of, split_item_name

__all__ = ["label_of", "make_tasks"]

_NAMES_SHOWN = 20
_REFUSALS_SHOWN = 3
_TASK_ID = re.compile(r"task\.\d+(\[|$)")


def make_tasks(requests: Sequence[TaskRequest], session: OpenSession) -> list[Task]:
    """The tasks of the requests, in order, with tasks in the place of references.

    Raises InvalidTask, which names the first wrong requests and counts the others, and LimitExceeded.
    """
    session.session.refuse_count(sum(_task_count(request) for request in requests))
    uids = session.new_uids(len(requests))
    batch = _RequestBatch(requests, uids, session)
    backends = {backend.name: backend for backend in session.session.backends}
    errors: dict[int, InvalidTask | None] = {}
    for index in batch.order():
        if batch.needs[index] & errors.keys():
            errors[index] = None  # the error of the request that it needs is reported
            continue
        try:
            with _naming_task(index, requests[index]):
                task = make_task(requests[index], uids[index], batch.task, session.functions.source)
                _set_backend(task, _route(requests[index], backends))
                batch.tasks[index] = task
        except InvalidTask as error:
            errors[index] = error
    _raise_errors([error for _, error in sorted(errors.items()) if error is not None])
    return [batch.tasks[index] for index in range(len(requests))]


def _task_count(request: TaskRequest) -> int:
    return len(request.for_each) if isinstance(request.for_each, list) else 1


def _raise_errors(errors: Sequence[InvalidTask]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        more = f" And {len(errors) - _REFUSALS_SHOWN} more tasks are wrong." if len(errors) > _REFUSALS_SHOWN else ""
        texts = [str(error) for error in errors[:_REFUSALS_SHOWN]]
        raise InvalidTask(" ".join(_without_repetition(texts)) + more)


def _without_repetition(texts: Sequence[str]) -> Iterator[str]:
    """The texts; what follows the first sentence stands once, behind the last text that has it."""
    advice = [text.partition(". ")[2] for text in texts]
    for number, text in enumerate(texts):
        first = text.partition(". ")[0]
        yield f"{first}." if advice[number] and advice[number] in advice[number + 1 :] else text


class _RequestBatch:
    """The requests of one call: their names, and the requests that each of them needs."""

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
        """The indices of the requests, each after the requests that it needs. Raises InvalidTask for a cycle."""
        try:
            return list(TopologicalSorter(self.needs).static_order())
        except CycleError as error:
            circle = " needs ".join(label_of(index, self.requests[index]) for index in reversed(error.args[1]))
            raise InvalidTask(f"these tasks wait for each other in a circle: {circle}. Remove a reference.") from None

    def _needs(self, index: int, request: TaskRequest) -> set[int]:
        with _naming_task(index, request):
            names = request.references() | set(request.after or ())
            in_batch = {name: found for name in names if (found := self._index_of(name)) is not None}
            for name in names - in_batch.keys():
                if request.on_upstream_failure == "cancel":
                    _refuse_failed(self._session_task(name, index))
            if index in (needs := set(in_batch.values())):
                raise InvalidTask("it refers to its own result; refer to another task.")
        return needs

    def _index_of(self, name: str) -> int | None:
        """The index of the request that makes the task with this name, also of one task of a for_each."""
        base, number = split_item_name(name)
        index = self._index.get(name, self._index.get(base) if number is not None else None)
        items_are_known = index is None or name in self._index or isinstance(self.requests[index].for_each, list | int)
        return index if items_are_known else None

    def task(self, name: str) -> Task:
        """The task with this name, of this call or an earlier call. A task of this call must have been made already."""
        index = self._index_of(name)
        if index is None:
            return self.session.task(name)
        return self.tasks[index] if name in self._index else child_named(self.tasks[index], name)

    def _session_task(self, name: str, index: int) -> Task:
        try:
            return self.session.task(name)
        except UnknownName as error:
            if error.valid:
                raise
            base, number = split_item_name(name)
            if base in self._index and number is not None:
                part = f'{{"ref": "{base}", "path": "/{number}"}}'
                raise InvalidTask(
                    f"{name} is not there before {base} has started; refer to its result as {part}, or in after to "
                    f"{base}."
                ) from None
            known = self._valid_references(index)
            valid = ", ".join(known[:_NAMES_SHOWN]) or "no other task yet"
            more = f", and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
            raise InvalidTask(f"unknown task {name!r}{nearest(name, known)}. Valid: {valid}{more}.") from None

    def _valid_references(self, index: int) -> list[str]:
        """The names that the request with this index may refer to."""
        in_batch = [request.name for other, request in enumerate(self.requests) if request.name and other != index]
        failed = (TaskState.FAILED, TaskState.CANCELED)
        return in_batch + [name_of(task) for task in self.session.session.tasks if task.state not in failed]


def _refuse_failed(task: Task) -> None:
    if task.cause is Cause.SKIPPED:
        raise InvalidTask(
            f'it needs the result of {name_of(task)}, which was skipped and has none; with "on_upstream_failure": '
            '"run" it runs with null for it.'
        )
    if task.state in (TaskState.FAILED, TaskState.CANCELED):
        raise InvalidTask(
            f"it needs the result of {name_of(task)}, which ended {task.state}; run that one again (retry) first."
        )


def _route(request: TaskRequest, backends: Mapping[str, Backend]) -> str:
    try:
        return route(kind_of_request(request), request.backend, backends)
    except NoBackend as error:
        hint = "vllm or endpoint" if error.kind == "prompt" else "dragon or local"
        message = f"{error} For a {error.kind}: create_session with {hint} in backends."
        raise InvalidTask(message, field=error.field) from None


def _set_backend(task: Task, backend: str) -> None:
    for each in (task, *(task.children if isinstance(task, ForEach) else ())):
        each.backend = backend


@contextmanager
def _naming_task(index: int, request: TaskRequest) -> Iterator[None]:
    """Put the label of the task before the message of each error."""
    try:
        yield
    except InvalidTask as error:
        raise error.of_task(label_of(index, request)) from error
    except UnknownName as error:
        raise InvalidTask(f"{label_of(index, request)}: {error}", field=error.field) from error


def label_of(index: int, request: TaskRequest) -> str:
    return f"tasks[{index}]" + (f" ({request.name!r})" if request.name else "")
