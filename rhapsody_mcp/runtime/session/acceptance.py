"""Checks the tasks of a submission before any of them is submitted, and chooses their backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Completion, Software, TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.dataflow.graph import depends_on
from rhapsody_mcp.runtime.limits import Limits, SessionUsage
from rhapsody_mcp.runtime.process_layout import with_software
from rhapsody_mcp.runtime.serialization import Encoder
from rhapsody_mcp.runtime.session.managed_backend import ManagedBackend
from rhapsody_mcp.runtime.session.routing import route
from rhapsody_mcp.runtime.tasks import (
    MOST_PRIORITY,
    ComputeTask,
    ForEach,
    Part,
    Task,
    is_hidden,
    kind_of,
    leaves,
    name_of,
    reference,
    with_children,
)

__all__ = ["Acceptance", "AcceptedTask"]


class AcceptedTask(NamedTuple):
    """A checked task, with its backend and its spec; a ForEach has neither."""

    task: Task
    backend: ManagedBackend | None = None
    spec: TaskSpec | None = None

    def order(self) -> int:
        """A number that is lower for what is submitted first: each ForEach, then the other tasks by priority."""
        return -MOST_PRIORITY - 1 if isinstance(self.task, ForEach) else -self.task.priority


class Acceptance:
    """Checks tasks for one session. `tasks` are the tasks of the session, by uid. Every method may run in a thread."""

    def __init__(
        self,
        backends: Mapping[str, ManagedBackend],
        tasks: Mapping[str, Task],
        limits: Limits | None,
        usage: SessionUsage,
        software: Software,
    ) -> None:
        """`software` is that of tasks that name none."""
        self._backends, self._tasks, self._limits, self._usage = backends, tasks, limits, usage
        self._software, self._has_software = software, bool(software)
        self._routes = {name: managed.backend for name, managed in backends.items()}

    def accept(self, batch: Sequence[Task]) -> list[AcceptedTask]:
        """Check a submission. The result has each ForEach after its children.

        Raises InvalidTask, UnknownName or LimitExceeded.
        """
        accepted = self.accept_hidden(batch)
        self._refuse_over_limits(accepted)
        return accepted

    def accept_hidden(self, batch: Sequence[Task]) -> list[AcceptedTask]:
        """Check internal tasks, to which no limit applies. Raises InvalidTask or UnknownName."""
        uids: dict[str, Task] = {}
        for task in batch:
            if not isinstance(task, Task):
                raise InvalidTask(
                    "submit_tasks takes ComputeTask and AITask objects, as ComputeTask(**fields) makes one of a dict; "
                    f"not a {type(task).__name__}."
                )
            if task.state is not TaskState.NEW or task.uid in self._tasks or task.uid in uids:
                raise InvalidTask(f"{task.uid} is submitted already; make a new task for a new run.", uid=task.uid)
            uids[task.uid] = task
            if isinstance(task, ForEach):
                uids |= {child.uid: child for child in task.children}
        encoder = Encoder(reference)
        specs = [(task, _specify(task, encoder)) for task in with_children(batch)]
        for task in batch:
            for source in task.sources():
                if source.uid not in uids and source.uid not in self._tasks and not is_hidden(source):
                    raise InvalidTask(
                        f"{task.uid} needs the result of {source.uid}, which is not in this session: "
                        "submit both in one call, or that one first.",
                        uid=task.uid,
                    )
        return [self._accept_task(task, spec) for task, spec in specs]

    def accept_children(self, parent: ForEach, items: Sequence[object]) -> list[AcceptedTask]:
        """Make the children of a ForEach for these items and check the children. Raises what `accept` raises."""
        self.refuse_count(len(items))
        parent.make_children(items)
        encoder = Encoder(reference)
        specs = [(child, _specify(child, encoder)) for child in parent.children]
        for source in {source.uid: source for child in parent.children for source in child.sources()}.values():
            if (source.uid not in self._tasks and not is_hidden(source)) or depends_on(source, parent):
                raise InvalidTask(f"its tasks need {name_of(source)}, which is not in this session or waits for it.")
        accepted = [self._accept_task(child, spec) for child, spec in specs]
        self._refuse_over_limits(accepted)
        return accepted

    def accept_restored(self, task: Task, encoder: Encoder) -> AcceptedTask:
        """Check a restored task, to which no limit applies. Raises InvalidTask or UnknownName."""
        return self._accept_task(task, _specify(task, encoder))

    def accept_again(self, tasks: Sequence[Task]) -> list[AcceptedTask]:
        """Check tasks that have ended and shall run again; limits count them again. Raises what `accept` raises."""
        encoder = Encoder(reference)
        accepted = [self.accept_restored(task, encoder) for task in tasks]
        self._refuse_over_limits(accepted)
        return accepted

    def software_of(self, task: Task) -> Software:
        """The software that the task runs with, of a ForEach that of its children; empty for a prompt."""
        task = next(iter(leaves([task])), task)
        return task.layout.software.over(self._software) if isinstance(task, ComputeTask) else Software()

    def _with_software(self, task: Task, spec: TaskSpec) -> TaskSpec:
        software = self._software_for(task, spec)
        return spec if software == spec.layout.software else replace(spec, layout=with_software(spec.layout, software))

    def _software_for(self, task: Task, spec: TaskSpec) -> Software:
        """An internal task, which reads results of others, runs with what the first that has any runs with."""
        own = spec.layout.software
        if isinstance(spec.work, Completion):
            return own
        if not is_hidden(task):
            return own.over(self._software)
        return own or next(filter(None, map(self.software_of, task.needs())), own)

    def refuse_count(self, count: int) -> None:
        """Raise LimitExceeded where `count` further tasks are too many."""
        if self._limits is not None:
            self._limits.refuse_count(self._usage, count)

    def _refuse_over_limits(self, accepted: Sequence[AcceptedTask]) -> None:
        if self._limits is not None:
            self._limits.refuse_tasks(self._usage, [task.spec for task in accepted if task.spec is not None])

    def _accept_task(self, task: Task, spec: TaskSpec | None) -> AcceptedTask:
        if spec is None:
            return AcceptedTask(task)
        try:
            managed = self._backends[route(kind_of(task), task.backend, self._routes)]
            is_internal = is_hidden(task)
            if is_internal or self._has_software:
                spec = self._with_software(task, spec)
            if self._limits is not None and not is_internal:
                spec = self._limits.admit(spec)
            managed.backend.check(spec)
        except InvalidTask as error:
            raise error.of_task(name_of(task), task.uid) from error
        return AcceptedTask(task, managed, spec)


def _specify(task: Task, encoder: Encoder) -> TaskSpec | None:
    """The spec of a task, None for a ForEach. Fixes the tasks that it needs, also those that only the pickler finds."""
    task.fix_needs()
    if isinstance(task, ForEach):
        return None
    try:
        spec = task.spec(encoder)
    except InvalidTask as error:
        raise error.of_task(name_of(task), task.uid) from error
    if encoder.referring_objects:
        task.fix_needs(item.task if isinstance(item, Part) else item for item in encoder.referring_objects)
        encoder.referring_objects = []
    return spec
