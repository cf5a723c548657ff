"""The base class of tasks, and the objects that stand for a task's result in other tasks."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, Self, get_args

import msgspec

from rhapsody_mcp.engine.task.comparison import Comparison
from rhapsody_mcp.model.errors import InvalidTask, RhapsodyError, nearest
from rhapsody_mcp.model.json_pointer import split_pointer
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Outcome, RankOutcome, TaskCanceled, TaskFailed
from rhapsody_mcp.model.sampling import check_integer
from rhapsody_mcp.model.specs import Content, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.timing import Timing
from rhapsody_mcp.model.values import PLAIN, Ref, Value
from rhapsody_mcp.runtime.serialization import Encoder
from rhapsody_mcp.runtime.tasks.task_html import task_html

__all__ = [
    "COMMON_FIELDS",
    "MOST_PRIORITY",
    "Condition",
    "OnUpstreamFailure",
    "Part",
    "Rank",
    "Task",
    "Text",
    "content",
    "is_hidden",
    "name_of",
    "rank_of",
    "reference",
    "tasks_in",
    "tasks_text",
]

OnUpstreamFailure = Literal["cancel", "run"]
MOST_PRIORITY = 1000
_ON_UPSTREAM_FAILURE = get_args(OnUpstreamFailure)
_uids = itertools.count(1)
COMMON_FIELDS = {
    *("backend", "name", "uid", "after", "retries", "retry_delay_s", "on_upstream_failure", "when", "priority")
}


class Part(msgspec.Struct, frozen=True):
    """A part of another task's result: in arguments and prompts, the value at `path`, a JSON Pointer."""

    task: Task
    path: str = ""


class Condition:
    """What must hold of a result, a Part of one, or plain data, at the JSON Pointer `path`, for a task to run.

    Give `above`, `below` or both, or `equals` any JSON value, or `exists`: whether it is there and not None.
    """

    def __init__(
        self,
        value: Any,
        path: str = "",
        *,
        above: float | None = None,
        below: float | None = None,
        equals: Any = msgspec.UNSET,
        exists: bool | None = None,
    ) -> None:
        part = value if isinstance(value, Part) else None
        self.value = part.task if part else value
        self.path = part.path + path if part else path
        self.comparison = Comparison(above=above, below=below, equals=equals, exists=exists)
        split_pointer(self.path)
        self.comparison.check()

    @property
    def source(self) -> Task | None:
        """The task whose result is compared."""
        return self.value if isinstance(self.value, Task) else None

    @property
    def subject(self) -> str:
        """As in `score/accuracy`."""
        if self.source is not None and is_hidden(self.source):  # the items of a list that only workers read
            return f"item {self.path[1:]}"
        return f"{name_of(self.source) if self.source else 'the item'}{self.path}"

    def __repr__(self) -> str:
        return f"<Condition {self.subject} {self.comparison}>"


class Text:
    """A text for a language model that holds results. Its parts, each a text, a task or a Part, are joined.

    A result that is a text is inserted unchanged, another result as JSON.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"Text({', '.join(map(repr, self.parts))})"


class Rank(msgspec.Struct, frozen=True):
    """One rank of a job. A negative `exit_code` is the signal that ended it."""

    rank: int
    host: str
    pid: int
    exit_code: int | None
    return_value: Any
    stdout: str
    stderr: str
    error: str


class Task:
    """A unit of work. After submission the session updates it in place.

    Awaiting it gives the task itself once it is DONE, raises TaskFailed once it is FAILED and TaskCanceled once
    it is CANCELED. Cancelling the caller that awaits it does not cancel the task.

    backend       a backend's name; default is the session's first that runs such tasks
    after         tasks that must be DONE before this one starts, besides the tasks whose results it uses
    retries       how often it is started again after it FAILED, first after `retry_delay_s`; the delay doubles each
                  time, up to a minute. A task that failed with cause invalid is not started again
    on_upstream_failure   "cancel" (default): it is CANCELED where a task that it waits for does not end DONE;
                  "run": it runs nevertheless, with None in the place of a missing result
    when          a Condition; where it does not hold, the task is skipped: it ends CANCELED with cause skipped, and so
                  do the tasks that need it

    priority      of the tasks that wait for a place, those of the highest priority start first; default 0

    `attempts` counts its starts. `replaced_by` is the uid of the task that took its name after it FAILED or was
    CANCELED. `passed_on` says whether another task uses its result. `position` is the number of tasks of the session
    that had ended before it.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        name: str | None = None,
        uid: str | None = None,
        after: Sequence[Task] = (),
        retries: int = 0,
        retry_delay_s: float = 1.0,
        on_upstream_failure: OnUpstreamFailure = "cancel",
        when: Condition | None = None,
        priority: int = 0,
    ) -> None:
        self.uid = uid or f"task.{next(_uids):06d}"
        self.name = name
        self.backend = backend
        self.after = _checked_after(after)
        self.retries = check_integer("retries", retries, least=0)
        self.retry_delay_s = _checked_delay(retry_delay_s)
        if on_upstream_failure not in _ON_UPSTREAM_FAILURE:
            raise InvalidTask(
                f'on_upstream_failure is {on_upstream_failure!r}; valid: "cancel", "run".', field="on_upstream_failure"
            )
        self.on_upstream_failure = on_upstream_failure
        if priority:
            self.priority = check_integer("priority", priority, least=-MOST_PRIORITY, most=MOST_PRIORITY)
        if when is not None:
            self.when = _checked_condition(when)
        self.attempts = 0
        self.state = TaskState.NEW
        self.submitted: float | None = None
        self.started: float | None = None
        self.outcome: Outcome | None = None
        self.return_value: Any = None
        self.stdout: str | None = None
        self.stderr: str | None = None
        self.ranks: Sequence[Rank] = ()
        self.parent: Task | None = None
        """The ForEach that made the task."""
        self.passed_on = False
        self.position: int | None = None
        self._future: asyncio.Future[Self] | None = None
        self._needs: Sequence[Task] | None = None

    kind: str
    # Most tasks never set these fields, nor most optional fields of an AITask; defaults on the class save memory.
    # Python shares the attribute names of a class's objects up to 29; an object with more needs 1.3 KB more.
    when: Condition | None = None
    priority = 0
    last_failure = ""
    replaced_by: str | None = None
    placed_on: tuple[str, ...] = ()
    """The nodes that it runs on, where they are known."""
    started_in: int | None = None
    """The number of the worker that it runs in, where it was told."""
    held_until = ""
    """What a QUEUED task waits for before a backend gets it, as in "its packages are installed"."""
    earlier_attempts = 0
    """Its attempts before it was run again on request; its retries count from there."""
    is_resumed = False
    """Whether its next attempt may run already, in an allocation that an earlier service had."""
    progress: Progress | None = None
    """What the task has told last of itself."""
    raised: BaseException | None = None
    """The exception that the function raised, where it can be pickled and opened in this process."""

    @property
    def most_attempts(self) -> int:
        """How often it is started at most."""
        return self.earlier_attempts + self.retries + 1

    def sources(self) -> Sequence[Task]:
        """The tasks that must have ended before this task starts: `needs()`, `after` and the source of `when`."""
        condition = [self.when.source] if self.when is not None and self.when.source is not None else ()
        return [*self.needs(), *self.after, *condition] if self.after or condition else self.needs()

    def needs(self) -> Sequence[Task]:
        """The tasks whose results this task uses."""
        return list(self._find_needs()) if self._needs is None else self._needs

    def fix_needs(self, more: Iterable[Task] = ()) -> None:
        """Fix the result of `needs()`, which the session calls often. `more` are tasks that only the pickler finds."""
        self._needs = tuple({task.uid: task for task in (*self._find_needs(), *more)}.values())

    def _find_needs(self) -> Iterable[Task]:
        raise NotImplementedError

    def spec(self, encoder: Encoder) -> TaskSpec:
        """The spec for a backend. Raises InvalidTask where a value cannot be sent."""
        raise NotImplementedError

    def forget_progress(self) -> None:
        """Forget what an earlier attempt has told."""
        if self.progress is not None:
            self.progress = None

    # --- outcome

    @property
    def exit_code(self) -> int | None:
        return self.outcome.exit_code if self.outcome else None

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that the task runs or ran on, the node of rank 0 first; empty on an engine of one
        node."""
        if self.outcome is not None:
            return self.outcome.nodes
        return self.placed_on if self.state is TaskState.RUNNING else ()

    @property
    def node(self) -> str | None:
        """The node that the task ran on, of a job the node of rank 0; None on an engine of one node."""
        return next(iter(self.nodes), None)

    @property
    def exception(self) -> TaskFailed | None:
        """The exception that awaiting the task raises, with the original message; None for a task without failure."""
        if self.outcome is None or self.outcome.state is TaskState.DONE:
            return None
        kind = TaskCanceled if self.outcome.state is TaskState.CANCELED else TaskFailed
        failure = kind(f"{self.uid}: {self.outcome.error}", self.outcome, self, self.uid)
        failure.__cause__ = self.raised
        return failure

    @property
    def cause(self) -> Cause | None:
        return self.outcome.cause if self.outcome else None

    @property
    def counted_as(self) -> str:
        """The name of the state, and "skipped" for a skipped task, which no count shows as canceled."""
        outcome = self.outcome
        return "skipped" if outcome is not None and outcome.cause is Cause.SKIPPED else self.state.value

    @property
    def traceback(self) -> str:
        """The traceback of the function as text; empty where the function did not raise."""
        return self.outcome.traceback if self.outcome else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the run, such as "4 ranks share 2 cores"."""
        return self.outcome.notes if self.outcome else ()

    @property
    def timing(self) -> Timing:
        if self.outcome is None:
            return Timing()
        return Timing.of(self.submitted, self.outcome.started, self.outcome.ended)

    # --- awaiting

    def __await__(self) -> Generator[Any, None, Self]:
        return asyncio.shield(self.future).__await__()

    @property
    def future(self) -> asyncio.Future[Self]:
        """Ends with the task. Raises RhapsodyError before submission."""
        if self._future is None:
            if self.state is TaskState.NEW:
                raise RhapsodyError(f"{self.uid} is not submitted yet: call session.submit_tasks([task]) first.")
            self._future = asyncio.get_running_loop().create_future()
            self.complete_future()
        return self._future

    def complete_future(self: Self) -> None:
        """Complete the future of an ended task, where the future exists."""
        if self._future is None or self._future.done() or not self.state.final:
            return
        if (error := self.exception) is None:
            self._future.set_result(self)
        else:
            self._future.set_exception(error)
            self._future.exception()  # without this, asyncio logs a failure that nobody awaits

    def forget_future(self) -> None:
        """Have the next `future` be about the next end."""
        self._future = None

    # --- access as a mapping

    def keys(self) -> list[str]:
        """The names of the fields that `task[name]` and `task.name` read."""
        return list(dict.fromkeys([*(name for name in vars(self) if not name.startswith("_")), *self._extra_keys]))

    def get(self, field: str, default: Any = None) -> Any:
        return getattr(self, field) if field in self else default

    def __getitem__(self, field: str) -> Any:
        if field not in self:
            raise KeyError(f"{field}{nearest(str(field), self.keys())}")
        return getattr(self, field)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, field: object) -> bool:
        return field in self.keys()

    _extra_keys: Sequence[str] = (
        *("exit_code", "exception", "cause", "traceback", "notes", "timing", "last_failure", "progress", "replaced_by"),
        *("raised", "when", "priority"),
    )

    def __getstate__(self) -> dict[str, Any]:
        """The state without the future, which belongs to an event loop."""
        return {**vars(self), "_future": None}

    @property
    def what(self) -> str:
        """What the task runs, for `repr`."""
        return ""

    def __repr__(self) -> str:
        return f"<{' '.join(filter(None, [type(self).__name__, self.uid, self.name, self.what, self.state]))}>"

    def _repr_html_(self) -> str:
        return task_html(self)


def _checked_after(after: object) -> tuple[Task, ...]:
    if isinstance(after, Task) or not isinstance(after, Iterable) or not all(isinstance(task, Task) for task in after):
        raise InvalidTask("after is a list of tasks, as in [first, second].", field="after")
    return tuple(after)


def _checked_condition(when: object) -> Condition:
    if not isinstance(when, Condition):
        raise InvalidTask("when is a Condition, as in Condition(score, '/accuracy', above=0.9).", field="when")
    return when


def _checked_delay(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 3600:
        raise InvalidTask(
            f"retry_delay_s is {seconds!r}; valid is a number of seconds from 0 to 3600.", field="retry_delay_s"
        )
    return float(seconds)


def reference(item: object) -> Ref | None:
    """The Ref of a task or a Part, for arguments and prompts; None for another object."""
    if isinstance(item, Task):
        return Ref(item.uid)
    return Ref(item.task.uid, item.path) if isinstance(item, Part) else None


def content(text: object) -> Content:
    """A text for a backend, with a Ref in the place of each result."""
    return tuple(map(_argument, text.parts)) if isinstance(text, Text) else _argument(text)


def _argument(item: object) -> str | Ref:
    return reference(item) or str(item)


def tasks_in(value: object) -> Iterator[Task]:
    """Every task in a value: in lists, tuples, sets and dicts at any depth, in Parts and in Texts."""
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if type(item) in PLAIN:
            continue
        if isinstance(item, Part):
            yield item.task
        elif isinstance(item, Task):
            yield item
        elif isinstance(item, Text):
            pending.extend(item.parts)
        elif isinstance(item, _CONTAINERS) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)


_CONTAINERS = (list, tuple, set, frozenset, dict)


def name_of(task: Task) -> str:
    """The name of a task, or its uid where the task has no name."""
    return task.name or task.uid


def is_hidden(task: Task) -> bool:
    """Whether the task is internal: no list or count shows it."""
    return task.uid[:1] == "~"


def tasks_text(count: int) -> str:
    """For example `1 task` or `3 tasks`."""
    return "1 task" if count == 1 else f"{count} tasks"


def rank_of(outcome: RankOutcome, read: Callable[[Value], Any]) -> Rank:
    """The rank for users, with its value decoded."""
    return Rank(
        outcome.rank,
        outcome.host,
        outcome.pid,
        outcome.exit_code,
        None if outcome.value is None else read(outcome.value),
        outcome.stdout.read(),
        outcome.stderr.read(),
        outcome.error,
    )
