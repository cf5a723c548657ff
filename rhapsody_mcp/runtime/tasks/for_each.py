"""The same task for each item of a list, and functions over tasks of every class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from rhapsody_mcp.backends.base import Kind
from rhapsody_mcp.model.errors import InvalidTask, UnknownName, refuse_unknown
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.serialization import Encoder
from rhapsody_mcp.runtime.tasks.ai_task import AITask
from rhapsody_mcp.runtime.tasks.compute_task import ComputeTask
from rhapsody_mcp.runtime.tasks.task import COMMON_FIELDS, Part, Task, name_of, tasks_in
from rhapsody_mcp.runtime.tasks.task_html import for_each_html

__all__ = ["ForEach", "child_named", "kind_of", "leaves", "split_item_name", "with_children"]


class ForEach(Task):
    """The same task for each item of a list, in parallel; the result is the list of the results, in order.

    items         a list, or a task (or Part of one) whose result is a list
    make          makes the task for an item; called with the item and its number. Where the result is no JSON, the
                  item is a Part, which stands for the item in arguments
    uses          tasks besides `items` whose results the children use; they must have ended first

    `children` are the tasks that `make` has made, with names such as `sweep[0]`. The children of a list are made at
    once. A ForEach is DONE when all children are DONE, else FAILED, or CANCELED where no child is FAILED. Its result
    then has None in the place of each missing result. Its `when` is about all children; a child that is skipped by a
    `when` of its own has None for its result, and the ForEach can be DONE.
    """

    kind = "for_each"

    def __init__(
        self,
        items: Sequence[Any] | Task | Part,
        make: Callable[[Any, int], ComputeTask | AITask],
        *,
        uses: Sequence[Task] = (),
        **common: Any,
    ) -> None:
        refuse_unknown("field of ForEach", common.keys() - COMMON_FIELDS, ("items", "make", "uses", *COMMON_FIELDS))
        super().__init__(**common)
        if not isinstance(items, Task | Part | list | tuple):
            raise InvalidTask(
                f"items is a list, or a task whose result is one, not a {type(items).__name__}.", field="items"
            )
        self.items, self.make = items, make
        self.children: list[ComputeTask | AITask] = []
        if isinstance(items, list | tuple):
            self.make_children(items)
            uses = [*uses, *{source.uid: source for child in self.children for source in child.needs()}.values()]
        self._uses = list(uses)

    @property
    def source(self) -> Part | None:
        """The result that the items are read from; None where the items are a list."""
        return (
            Part(self.items) if isinstance(self.items, Task) else self.items if isinstance(self.items, Part) else None
        )

    def make_children(self, items: Sequence[Any]) -> None:
        """Make the child of each item. Raises InvalidTask, which names the item, where `make` raises it."""
        self.children = [self._child(item, number) for number, item in enumerate(items)]

    def _child(self, item: Any, number: int) -> ComputeTask | AITask:
        try:
            child = self.make(item, number)
        except InvalidTask as error:
            raise InvalidTask(f"item {number}: {error}", field=error.field) from error
        child.uid, child.name = f"{self.uid}[{number}]", f"{name_of(self)}[{number}]"
        child.backend = child.backend or self.backend
        child.after, child.on_upstream_failure = self.after, self.on_upstream_failure
        child.retries, child.retry_delay_s = self.retries, self.retry_delay_s
        if self.priority and not child.priority:
            child.priority = self.priority
        if self.when is not None:
            if child.when is not None:
                raise InvalidTask("give when to the ForEach or to what make makes, not to both.", field="when")
            child.when = self.when
        child.parent = self
        return child

    def _find_needs(self) -> Iterable[Task]:
        return [*tasks_in([self.items]), *self._uses]

    def spec(self, encoder: Encoder) -> TaskSpec:
        raise NotImplementedError("its children are what backends get")

    def _repr_html_(self) -> str:
        return for_each_html(self, self.children)


def split_item_name(name: str) -> tuple[str, int | None]:
    """As in `sweep` and 3 for `sweep[3]`; None for a name of another form."""
    base, bracket, number = name.removesuffix("]").rpartition("[")
    is_item = bool(bracket) and name.endswith("]") and is_index(number)
    return (base, int(number)) if is_item else (name, None)


def child_named(parent: Task, name: str) -> Task:
    """The child of a ForEach with a name such as `sweep[3]`. Raises UnknownName, which says which there are."""
    base, number = split_item_name(name)
    children = parent.children if isinstance(parent, ForEach) else []
    if number is not None and number < len(children):
        return children[number]
    valid = f"{base}[0] to {base}[{len(children) - 1}]" if children else f"{base}, which has no tasks of its own"
    raise UnknownName("task", name, (), valid)


def kind_of(task: Task) -> Kind | Literal["for_each"]:
    """The kind that a backend must support to run the task. The session itself runs a ForEach."""
    if isinstance(task, ForEach):
        return "for_each"
    if isinstance(task, AITask):
        return "prompt"
    return "function" if isinstance(task, ComputeTask) and task.function is not None else "executable"


def leaves(tasks: Iterable[Task]) -> list[Task]:
    """The tasks, with the children of a ForEach in its place where the ForEach has children."""
    leaf_tasks: list[Task] = []
    for task in tasks:
        leaf_tasks += task.children if isinstance(task, ForEach) and task.children else [task]
    return leaf_tasks


def with_children(tasks: Iterable[Task]) -> Iterator[Task]:
    """Each task, a ForEach after its children."""
    for task in tasks:
        if isinstance(task, ForEach):
            yield from task.children
        yield task
