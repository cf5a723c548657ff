"""The session: takes tasks, feeds results from one to the next, hands them to backends, keeps account."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from msgspec.structs import replace

from rhapsody_mcp.backends.base import Backend, Ended, Running
from rhapsody_mcp.engine.process.run_dirs import Folder
from rhapsody_mcp.model.errors import (
    InvalidRequest,
    InvalidTask,
    LimitExceeded,
    RhapsodyError,
    SessionClosed,
    TaskFailed,
    UnknownName,
)
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.statistics import Statistics
from rhapsody_mcp.model.values import NOTHING, Reader, Value, load, load_json
from rhapsody_mcp.runtime.dataflow.for_each_values import join, outcome_of, read_items
from rhapsody_mcp.runtime.dataflow.graph import leads_to, refuse_cycles
from rhapsody_mcp.runtime.limits import Rules, Taken
from rhapsody_mcp.runtime.serialization import Encoder, Module
from rhapsody_mcp.runtime.session.managed_backend import Lane, Notice
from rhapsody_mcp.runtime.session.statistics import Account
from rhapsody_mcp.runtime.tasks import (
    ComputeTask,
    ForEach,
    Part,
    Task,
    is_hidden,
    kind_of,
    leaves,
    name_of,
    rank_of,
    reference,
    with_children,
)

__all__ = ["Accepted", "Session"]

_T = TypeVar("_T")
_uids = itertools.count(1)

_log = logging.getLogger(__name__)
_LONGEST_DELAY_S = 60.0
_MOST_NOTICES = 100
_AT_ONCE = 250
"""So many tasks are taken, queued or ended in one step of a service's event loop, which serves others in between."""


class Session:
    """Runs tasks on one or more backends.

    Leaving `async with session`, or `close()`, cancels what has not ended and stops the backends.
    """

    def __init__(
        self,
        backends: Sequence[Backend] = (),
        uid: str | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        *,
        opens_results: bool = True,
        engine_idle_s: float | None = None,
        folder: Path | None = None,
        rules: Rules | None = None,
    ) -> None:
        """`uid` is a name of its own, in place of one such as "session.0001". In `work_dir`, which is made where it is
        not there, tasks start that have no cwd; default is the current directory. It is for backends that have not
        started: InvalidRequest is raised for one that has.

        `opens_results=False` is for a process in which no user code may run: results stay encoded.

        `folder` is where long results lie, in place of a temporary one; it outlives the session.
        With `engine_idle_s` a backend that has had no task for so long, and for which none waits, stops its engine
        until the next one. `rules` hold the tasks to the settings of a server.
        """
        names = [backend.name for backend in backends]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidRequest(f"two backends are named {twice.pop()!r}; give one another name (name=...).")
        self.uid = uid or f"session.{next(_uids):04d}"
        self.work_dir = None if work_dir is None else os.path.abspath(work_dir)
        if self.work_dir is not None:
            os.makedirs(self.work_dir, exist_ok=True)
            for backend in backends:
                backend.work_in(self.work_dir)
        self._read: Reader = load if opens_results else load_json
        self._lanes = {backend.name: self._lane(backend, engine_idle_s) for backend in backends}
        self._opens_results = opens_results
        self._submitted: list[Task] = []
        self._tasks: dict[str, Task] = {}
        self._going: dict[str, Task] = {}
        self._specs: dict[str, TaskSpec] = {}
        self._missing: dict[str, set[str]] = {}
        self._dependents: dict[str, list[str]] = {}
        self._unfinished: dict[str, int] = {}
        self._retrying: dict[str, asyncio.TimerHandle] = {}
        self._fan_outs: dict[str, asyncio.Task[None]] = {}
        self._hidden = 0
        self._taking = asyncio.Lock()
        """Held while tasks are taken step by step: who cancels them waits until all are here."""
        self._rules, self.taken = rules, Taken()
        self._folder = folder.absolute() if folder is not None else None
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._temporary: Folder | None = None
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.ended: list[Task] = []
        """Every task that has ended, first ended first; a ForEach after its children."""
        self.replaced: list[Task] = []
        """The tasks that another one took the name of."""
        self._account = Account(self.ended, self._going, self._tasks)
        self.on_change: Callable[[Task], None] | None = None
        """Called after each change of a task's state; a start that is heard of together with the end is no change."""
        self.notices: deque[Notice] = deque(maxlen=_MOST_NOTICES)
        """The last of what became of the engines: that one ended, was started again, was stopped to rest."""

    def _lane(self, backend: Backend, idle_s: float | None) -> Lane:
        return Lane(
            backend,
            self._report,
            self._read,
            tell=lambda notice: self.notices.append(notice),
            is_needed=lambda: any(task.backend == backend.name for task in self._going.values()),
            idle_s=idle_s,
        )

    # --- what there is

    @property
    def tasks(self) -> list[Task]:
        """Every task, in the order of submission. The children of a ForEach are in it alone."""
        return list(self._submitted)

    @property
    def size(self) -> int:
        """How many these are."""
        return len(self._submitted)

    @property
    def backends(self) -> list[Backend]:
        return [lane.backend for lane in self._lanes.values()]

    @property
    def engines(self) -> dict[str, str]:
        """What the engine of each backend does now, in words, for those that say."""
        return {name: lane.progress for name, lane in self._lanes.items() if lane.progress}

    @property
    def closed(self) -> bool:
        return self._closing is not None

    @property
    def counts(self) -> dict[str, int]:
        """How many tasks are in which state, with the children of a ForEach in its place; without replaced ones."""
        return dict(Counter(task.state.value for task in leaves(self._current)))

    @property
    def _current(self) -> list[Task]:
        return [task for task in self._submitted if task.replaced_by is None]

    def get_statistics(self, group: str | None = None) -> Statistics:
        """Counts, times, rates and the critical path of this session's tasks, or of one group of them, now.

        Groups and everything else are as `Statistics` and `summarise` of `rhapsody_mcp.model.statistics` say; replaced
        tasks are left out. Raises UnknownName where no task is in such a group.
        """
        return self._account.statistics(self.backends, group)

    def replace(self, task: Task, uid: str) -> None:
        """Have a task that ended as one that another took the name of: it does not count any more."""
        task.replaced_by = uid
        self.replaced.append(task)
        self._account.replaced(task)

    # --- submission

    async def submit_tasks(self, tasks: Iterable[Task] | Task) -> list[asyncio.Future[Task]]:
        """Take these tasks, whole or not at all, and give a future for each, in order.

        A future ends with its task and then gives the task; awaiting it raises as awaiting the task does.
        Raises InvalidTask, UnknownName or SessionClosed with nothing taken. Backends that have not been started
        start now; tasks are QUEUED meanwhile.
        """
        self._refuse_other_loop()
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        self._take(self.accept(batch))
        self._submitted += batch
        return [task.future for task in batch]

    def accept(self, tasks: Sequence[Task]) -> list[Accepted]:
        """Raise what `submit_tasks` would raise for these tasks, or give what `take` needs; nothing is taken."""
        self._refuse_closed()
        accepted = self._accept(tasks)
        if self._rules is not None:
            self._rules.refuse_tasks(self.taken, [spec for _, _, spec in accepted if spec is not None])
        return accepted

    def refuse_count(self, count: int) -> None:
        """Raise LimitExceeded where so many more tasks are too many."""
        if self._rules is not None:
            self._rules.refuse_count(self.taken, count)

    async def take(self, tasks: Sequence[Task], accepted: Sequence[Accepted]) -> None:
        """Take what was accepted, step by step; it is whole when this returns, and is not to be cancelled.

        In between, nothing else may be submitted. Raises SessionClosed, with nothing taken.
        """
        async with self._taking:
            self._refuse_closed()
            self._submitted += tasks
            await self._take_in_steps(accepted)

    async def _take_in_steps(self, accepted: Sequence[Accepted]) -> None:
        now = time.time()
        for task, _, _ in accepted:
            task.state, task.submitted = TaskState.WAITING, task.submitted or now
        children_last = sorted(accepted, key=lambda one: not isinstance(one[0], ForEach))
        for lot in _lots(children_last):
            self._take(lot)
            await asyncio.sleep(0)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise SessionClosed("this session is closed; open another one with Session(backends=[...]).")

    def _refuse_other_loop(self) -> None:
        """Raise where this is not the event loop that its backends and tasks live in."""
        loop = asyncio.get_running_loop()
        if (self._loop or loop) is not loop:
            raise InvalidRequest(
                "this session lives in the event loop of an asyncio.run() that is not this one, where its tasks cannot "
                "be waited for. Do all of its work inside one asyncio.run(), or open another session here."
            )
        self._loop = loop

    def restore(self, tasks: Sequence[Task], ended: Sequence[Task], unreadable: Mapping[str, str]) -> None:
        """Take the tasks of an earlier life of this session, which has none yet.

        Each has the state that it had: those that ended are `ended`, in the order of their ends, and stay as they
        are; the others are NEW and run. Those that cannot any more, some for the reasons in `unreadable` by their uids,
        end FAILED with cause invalid.
        """
        self._submitted += tasks
        self.ended += ended
        for position, task in enumerate(self.ended):
            task.position = position
        encoder, refused = Encoder(reference), dict(unreadable)
        for task in with_children(tasks):
            task.settle_needs()
            accepted: Accepted = task, None, None
            try:
                accepted = self._checked(task, _specify(task, encoder))
            except RhapsodyError as error:
                refused.setdefault(task.uid, str(error))
            (self._keep if task.state.final else self._register)(*accepted)
        going = [task for task in with_children(tasks) if not task.state.final]
        for task in going:
            if task.uid in refused:
                why = refused[task.uid]
                self._end(task, Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=why))
        self._queue([task for task in going if self._is_ready(task)])

    def _keep(self, task: Task, lane: Lane | None, spec: TaskSpec | None) -> None:
        """Have a task that ended in an earlier life."""
        self._have(task, lane, spec)
        if spec is not None:
            self.taken.end(task.outcome or _canceled(Cause.LOST, ""))
        task.settle()

    def _have(self, task: Task, lane: Lane | None, spec: TaskSpec | None) -> None:
        if lane is not None and spec is not None:
            task.backend, self._specs[task.uid] = lane.backend.name, spec
            if not is_hidden(task):
                self.taken.add(spec)
        self._tasks[task.uid] = task
        if not task.state.final:
            self._going[task.uid] = task
        for source in task.needs():
            source.passed_on = True

    def _take(self, accepted: Sequence[Accepted]) -> None:
        for task, lane, spec in accepted:
            self._register(task, lane, spec)
        self._queue([task for task, _, _ in accepted if self._is_ready(task)])

    def _is_ready(self, task: Task) -> bool:
        return not self._missing.get(task.uid) and task.state is TaskState.WAITING

    async def run_hidden(self, task: Task) -> Task:
        """Run a task of this program's own, which no list or count shows, and give it when it has ended.

        Raises what `submit_tasks` raises.
        """
        self._refuse_closed()
        self._hidden += 1
        task.uid = f"~{self._hidden}"
        self._take(self._accept([task]))
        try:
            await asyncio.wait([task.future])
        except asyncio.CancelledError:
            for one, _ in self._withdraw([task]):
                self._end(one, _canceled(Cause.CANCELED, "nobody waits for it"))
            raise
        return task

    def _accept(self, batch: Sequence[Task]) -> list[Accepted]:
        uids = {}
        for task in batch:
            if not isinstance(task, Task):
                raise InvalidTask(f"submit_tasks takes ComputeTask and AITask objects, not a {type(task).__name__}.")
            if task.state is not TaskState.NEW or task.uid in self._tasks or task.uid in uids:
                raise InvalidTask(f"{task.uid} is submitted already; make a new task for a new run.")
            uids[task.uid] = task
        encoder = Encoder(reference)
        specs = [(task, _specify(task, encoder)) for one in batch for task in with_children([one])]
        for task in batch:
            for source in task.sources():
                if source.uid not in uids and source.uid not in self._tasks:
                    raise InvalidTask(
                        f"{task.uid} needs the result of {source.uid}, which is not in this session: "
                        "submit both in one call, or that one first."
                    )
        refuse_cycles(uids)
        return [self._checked(task, spec) for task, spec in specs]

    def _checked(self, task: Task, spec: TaskSpec | None) -> Accepted:
        if spec is None:
            return task, None, None
        lane = self._route(task)
        try:
            if self._rules is not None and not is_hidden(task):
                spec = self._rules.admit(spec)
            lane.backend.check(spec)
        except InvalidTask as error:
            raise InvalidTask(f"{name_of(task)}: {error}") from error
        return task, lane, spec

    def _route(self, task: Task) -> Lane:
        kind = kind_of(task)
        if task.backend is None:
            for lane in self._lanes.values():
                if kind in lane.backend.kinds:
                    return lane
            raise InvalidTask(f"{name_of(task)} is a {kind}, and no backend of this session runs one.")
        if task.backend not in self._lanes:
            raise UnknownName("backend", task.backend, self._lanes)
        lane = self._lanes[task.backend]
        if kind not in lane.backend.kinds:
            able = [repr(other.backend.name) for other in self._lanes.values() if kind in other.backend.kinds]
            raise InvalidTask(
                f"{name_of(task)} is a {kind}, which backend {task.backend!r} does not run; "
                f"{', '.join(able) or 'none here'} does."
            )
        return lane

    def _register(self, task: Task, lane: Lane | None, spec: TaskSpec | None) -> None:
        self._have(task, lane, spec)
        task.submitted = task.submitted or time.time()
        task.state = TaskState.WAITING
        has_all = isinstance(task, ForEach) and (task.source is None or bool(task.children))
        sources = () if has_all else task.sources()
        if sources and (unfinished := {source.uid for source in sources if not source.state.final}):
            self._missing[task.uid] = unfinished
            for uid in unfinished:
                self._dependents.setdefault(uid, []).append(task.uid)
        if isinstance(task, ForEach) and has_all:
            self._watch_children(task)
        self._tell(task)

    # --- from task to task

    def _queue(self, tasks: Sequence[Task]) -> None:
        """Hand tasks whose sources have ended to their backends; of many, the first at once."""
        self._hand_over(tasks[:_AT_ONCE])
        if len(tasks) > _AT_ONCE:
            self._spawn(self._queue_later(tasks[_AT_ONCE:]))

    async def _queue_later(self, tasks: Sequence[Task]) -> None:
        for lot in _lots(tasks):
            await asyncio.sleep(0)
            if not self.closed:
                self._hand_over([task for task in lot if not task.state.final])

    def _hand_over(self, tasks: Sequence[Task]) -> None:
        by_lane: dict[str, list[TaskRun]] = {}
        folder = str(self.folder)
        for task in tasks:
            if failed := self._failed_source(task):
                self._end(task, _canceled_with(failed))
                continue
            task.state = TaskState.QUEUED
            self._tell(task)
            if isinstance(task, ForEach):
                self._fan_outs[task.uid] = self._spawn(self._fan_out(task))
                continue
            task.attempts += 1
            by_lane.setdefault(task.backend or "", []).append(self._order(task, folder))
        for name, orders in by_lane.items():
            self._lanes[name].take(orders)

    def _failed_source(self, task: Task) -> Task | None:
        for source in task.sources() if task.on_upstream_failure == "cancel" else ():
            if source.state is not TaskState.DONE:
                return source
        return None

    def _order(self, task: Task, folder: str) -> TaskRun:
        bindings = {source.uid: (source.outcome and source.outcome.value) or NOTHING for source in task.needs()}
        return TaskRun(spec=self._specs[task.uid], bindings=bindings, folder=folder, attempt=max(1, task.attempts))

    @property
    def folder(self) -> Path:
        """Where results that are too long for a message lie."""
        if self._folder is None:
            self._temporary = Folder()
            self._folder = self._temporary.path
        return self._folder

    # --- one task for each item

    def _watch_children(self, parent: ForEach) -> None:
        """Its children are in, or there is nothing to do."""
        parent.state = TaskState.QUEUED
        self._unfinished[parent.uid] = sum(not child.state.final for child in parent.children)
        if not self._unfinished[parent.uid]:
            self._spawn(self._gather(parent))

    async def fanned_out(self, tasks: Iterable[Task]) -> None:
        """Return when those of these that are made of a JSON result which is there already have their children."""
        sources = {task.uid: task.source.task for task in tasks if isinstance(task, ForEach) and task.source}
        values = {uid: source.outcome.value for uid, source in sources.items() if source.outcome}
        going = [self._fan_outs[uid] for uid, value in values.items() if uid in self._fan_outs and _is_json(value)]
        if going:
            await asyncio.wait(going)

    async def _fan_out(self, parent: ForEach) -> None:
        try:
            await self._make_children(parent)
        finally:
            self._fan_outs.pop(parent.uid, None)

    async def _make_children(self, parent: ForEach) -> None:
        try:
            items = await self._items_of(parent)
            async with self._taking:
                if parent.state.final:
                    return
                many = len(items) > _AT_ONCE and not self._opens_results
                make = self._accept_children  # in a service what makes them is its own
                accepted = await asyncio.to_thread(make, parent, items) if many else make(parent, items)
                self._watch_children(parent)
                await self._take_in_steps(accepted)
        except (RhapsodyError, OSError) as error:
            parent.children = []
            self._end(parent, Outcome(state=TaskState.FAILED, ended=time.time(), cause=Cause.INVALID, error=str(error)))

    def _accept_children(self, parent: ForEach, items: Sequence[Any]) -> list[Accepted]:
        self.refuse_count(len(items))
        parent.make_children(items)
        encoder = Encoder(reference)
        specs = [(child, _specify(child, encoder)) for child in parent.children]
        for source in {source.uid: source for child in parent.children for source in child.sources()}.values():
            if (source.uid not in self._tasks and not is_hidden(source)) or leads_to(source, parent):
                raise InvalidTask(f"its tasks need {name_of(source)}, which is not in this session or waits for it.")
        accepted = [self._checked(child, spec) for child, spec in specs]
        if self._rules is not None:
            self._rules.refuse_tasks(self.taken, [spec for _, _, spec in accepted if spec is not None])
        return accepted

    async def _items_of(self, parent: ForEach) -> Sequence[Any]:
        source = parent.source
        assert source is not None, "the children of a list are made at once"
        value = source.task.outcome.value if source.task.outcome else None
        if value is None or value.format == "json":
            return await read_items(source)
        listed = await self.run_hidden(
            ComputeTask(Module("rhapsody_mcp.engine.task.inspection:as_list"), args=(source,))
        )
        if listed.state is not TaskState.DONE or listed.outcome is None or listed.outcome.value is None:
            raise InvalidTask(
                f"for_each needs a list: {listed.outcome.error if listed.outcome else 'nothing came back'}"
            )
        if listed.outcome.value.format == "json":
            return await read_items(Part(listed))
        return [Part(listed, f"/{number}") for number in range(listed.outcome.value.length or 0)]

    def _child_has_ended(self, parent: ForEach) -> None:
        self._unfinished[parent.uid] -= 1
        if not self._unfinished[parent.uid] and not self.closed:
            self._spawn(self._gather(parent))

    async def _gather(self, parent: ForEach) -> None:
        """Make one result of its children's."""
        values = [
            child.outcome.value if child.outcome and child.state is TaskState.DONE else None
            for child in parent.children
        ]
        value: Value | None
        try:
            if all(value is None or value.format == "json" for value in values):
                most = self._rules.settings.max_result_bytes if self._rules else None
                value = await join(values, self.folder, most)
            else:
                children = [child if child.state is TaskState.DONE else None for child in parent.children]
                gathered = await self.run_hidden(ComputeTask(Module("builtins:list"), args=(children,)))
                await gathered
                value = gathered.outcome.value if gathered.outcome else None
            outcome = outcome_of(parent, value)
        except (RhapsodyError, OSError) as error:
            message = f"its results cannot be put together: {error}"
            cause = Cause.ERROR if isinstance(error, LimitExceeded | TaskFailed) else Cause.LOST
            outcome = Outcome(state=TaskState.FAILED, ended=time.time(), cause=cause, error=message)
        parent.return_value = [child.return_value for child in parent.children]
        self._end(parent, outcome)

    # --- what backends report

    def _report(self, event: Running | Ended) -> None:
        task = self._tasks[event.uid]
        if task.state.final:
            return
        if isinstance(event, Running):
            self._run(task, event.at)
            self._run_parent(task, event.at)
            return
        outcome = event.outcome
        if self._rules is not None and outcome.cause is Cause.TIMEOUT:
            asked_s = getattr(task, "task_backend_specific_kwargs", {}).get("timeout")
            outcome = self._rules.in_words(outcome, asked_s)
        if outcome.started is not None:
            self._run_parent(task, outcome.started)
        if self._tries_again(task, outcome):
            self._try_again_later(task, outcome)
        elif not self._opens_results:
            self._end(task, outcome)
        elif outcome.value is not None and outcome.value.file is not None:
            self._spawn(self._open_long_result(task, outcome))
        else:
            self._end(task, self._opened(task, outcome))

    def _run(self, task: Task, at: float) -> None:
        task.state, task.started = TaskState.RUNNING, at
        self._tell(task)

    def _run_parent(self, task: Task, at: float) -> None:
        if task.parent is not None and task.parent.state is TaskState.QUEUED:
            self._run(task.parent, at)

    def _tries_again(self, task: Task, outcome: Outcome) -> bool:
        failed = outcome.state is TaskState.FAILED and outcome.cause is not Cause.INVALID
        return failed and task.attempts <= task.retries and not self.closed

    def _try_again_later(self, task: Task, outcome: Outcome) -> None:
        task.state, task.started = TaskState.QUEUED, None
        task.last_failure = f"attempt {task.attempts} ended with cause {outcome.cause}: {outcome.error}"
        delay_s = min(task.retry_delay_s * 2.0 ** (task.attempts - 1), _LONGEST_DELAY_S)
        self._retrying[task.uid] = asyncio.get_running_loop().call_later(delay_s, self._try_again, task)
        self._tell(task)

    def _try_again(self, task: Task) -> None:
        del self._retrying[task.uid]
        self._queue([task])

    async def _open_long_result(self, task: Task, outcome: Outcome) -> None:
        opened = await asyncio.to_thread(self._opened, task, outcome)
        if not task.state.final:
            self._end(task, opened)

    def _opened(self, task: Task, outcome: Outcome) -> Outcome:
        """Give the task what its user sees; a result that cannot be opened here makes it FAILED."""
        task.stdout, task.stderr = outcome.stdout.read(), outcome.stderr.read()
        if outcome.exception:
            task.raised = _exception_in(outcome.exception)
        try:
            if outcome.ranks:
                task.ranks = tuple(rank_of(rank, self._read) for rank in outcome.ranks)
            if outcome.value is not None:
                task.return_value = self._read(outcome.value)
        except (Exception, SystemExit) as error:  # unpickling runs the user's own code
            message = f"its result cannot be opened here: {type(error).__name__}: {error}"
            return Outcome(state=TaskState.FAILED, ended=outcome.ended, cause=Cause.ERROR, error=message)
        return outcome

    def _end(self, task: Task, outcome: Outcome) -> None:
        """Give a task its final state, then everything that hangs on it its next one."""
        ended = [(task, outcome)]
        ready: list[Task] = []
        for task, outcome in ended:  # which grows meanwhile
            if task.state.final:
                continue
            if task.last_failure:
                outcome = replace(outcome, notes=(*outcome.notes, _attempts_text(task, outcome)))
            task.outcome, task.state, task.started = outcome, outcome.state, outcome.started
            self._forget(task)
            task.settle()
            self._tell(task)
            if task.parent is not None:
                self._child_has_ended(task.parent)
            for uid in self._dependents.pop(task.uid, ()):
                missing = self._missing.get(uid, set())
                missing.discard(task.uid)
                dependent = self._tasks[uid]
                if outcome.state is not TaskState.DONE and dependent.on_upstream_failure == "cancel":
                    ended.append((dependent, _canceled_with(task)))
                elif not missing and not dependent.state.final:
                    ready.append(dependent)
        if ready and not self.closed:
            self._queue(ready)

    def _forget(self, task: Task) -> None:
        self._missing.pop(task.uid, None)
        self._going.pop(task.uid, None)
        spec = self._specs.pop(task.uid, None)
        if is_hidden(task):
            self._tasks.pop(task.uid, None)
        else:
            task.position = len(self.ended)
            self.ended.append(task)
            if spec is not None and task.outcome is not None:
                self.taken.end(task.outcome)
            self._account.add_up()

    def _tell(self, task: Task) -> None:
        if self.on_change is not None and not is_hidden(task):
            self.on_change(task)

    # --- waiting, canceling, closing

    async def wait_tasks(self, tasks: Iterable[Task] | Task, timeout: float | None = None) -> list[Task]:
        """Wait until each of these tasks has ended, and give them back in order. Never raises for a task.

        Raises TimeoutError after `timeout` seconds; the tasks go on.
        """
        self._refuse_other_loop()
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        futures = [task.future for task in batch]
        try:
            async with asyncio.timeout(timeout):
                for future in futures:
                    if not future.done():
                        await asyncio.wait([future])
        except TimeoutError:
            if pending := sum(not future.done() for future in {*futures}):
                raise TimeoutError(f"{pending} of {len({*futures})} tasks have not ended after {timeout} s") from None
        return batch

    async def cancel(self, tasks: Iterable[Task] | Task) -> list[Task]:
        """Cancel tasks and wait until each has ended, its processes too. Ended tasks stay as they are."""
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        for task in batch:
            if task.uid not in self._tasks:
                raise UnknownName("task", task.uid, self._tasks)
        await asyncio.shield(self._spawn(self._cancel([*leaves(batch), *batch], "canceled on request")))
        return await self.wait_tasks(batch)

    async def _cancel(self, tasks: Collection[Task], message: str) -> None:
        """Nothing of these starts any more from the first step on; what waited is ended step by step."""
        async with self._taking:
            while tasks:
                moved: list[Task] = []
                for lot in _lots(self._withdraw(tasks)):
                    for task, state in lot:
                        if task.state is state:
                            self._end(task, _canceled(Cause.CANCELED, message))
                        else:
                            moved.append(task)
                    await asyncio.sleep(0)
                tasks = moved

    def _withdraw(self, tasks: Collection[Task]) -> list[tuple[Task, TaskState]]:
        """Cancel these where they are; what is nowhere is given back, to be ended if this is its state still."""
        ending: list[Task] = []
        by_lane: dict[str, set[str]] = {}
        for task in tasks:
            if isinstance(task, ForEach):
                if not self._unfinished.get(task.uid):  # one that has children ends when they have
                    ending.append(task)
            elif (timer := self._retrying.pop(task.uid, None)) is not None:
                timer.cancel()
                ending.append(task)
            else:
                by_lane.setdefault(task.backend or "", set()).add(task.uid)
        for name, uids in by_lane.items():
            held = self._lanes[name].withdraw(uids)
            there = [self._tasks[uid] for uid in uids]
            ending += [task for task in there if task.uid in held or task.state is TaskState.WAITING]
            self._lanes[name].cancel(uids)
        return [(task, task.state) for task in ending if not task.state.final]

    async def close(self) -> None:
        """Cancel what has not ended, stop the backends, and delete the session's files.

        Returns when nothing is left running. A second call waits for the first. Finished tasks keep their
        results.
        """
        self._refuse_other_loop()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        message = "its session was closed"
        await self._cancel(list(self._going.values()), message)
        failures = await asyncio.gather(*(lane.close() for lane in self._lanes.values()), return_exceptions=True)
        await asyncio.gather(*self._background, return_exceptions=True)
        for task in list(self._going.values()):
            self._end(task, _canceled(Cause.CANCELED, message))
        if self._temporary is not None:
            self._temporary.remove()
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _lots(many: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """In their order, so many as one step takes."""
    return (many[start : start + _AT_ONCE] for start in range(0, len(many), _AT_ONCE))


def _is_json(value: Value | None) -> bool:
    return value is not None and value.format == "json"


def _specify(task: Task, encoder: Encoder) -> TaskSpec | None:
    """What a backend gets, and with it what the task needs; a ForEach needs what its tasks do."""
    task.settle_needs()
    if isinstance(task, ForEach):
        return None
    try:
        spec = task.spec(encoder)
    except InvalidTask as error:
        raise InvalidTask(f"{name_of(task)}: {error}") from error
    if encoder.met:
        task.settle_needs(item.task if isinstance(item, Part) else item for item in encoder.met)
        encoder.met = []
    return spec


Accepted = tuple[Task, Lane | None, TaskSpec | None]
"""With the lane and the spec of what a backend runs; a ForEach has none."""


def _exception_in(data: bytes) -> BaseException | None:
    """None where its class, or what it holds, is not to be had here."""
    try:
        error = pickle.loads(data)
    except (Exception, SystemExit):  # unpickling runs the user's own code
        return None
    return error if isinstance(error, BaseException) else None


def _attempts_text(task: Task, outcome: Outcome) -> str:
    """As in `attempt 3 of 3, no retry is left; attempt 2 ended with cause error: ...`."""
    used_up = outcome.state is TaskState.FAILED and task.attempts > task.retries
    left = ", no retry is left" if used_up else ""
    return f"attempt {task.attempts} of {max(task.attempts, task.retries + 1)}{left}; {task.last_failure}"


def _canceled(cause: Cause, message: str) -> Outcome:
    return Outcome(state=TaskState.CANCELED, ended=time.time(), cause=cause, error=message)


def _canceled_with(source: Task) -> Outcome:
    """Because of a task that did not end DONE; what that one failed from is said once, however long the chain is."""
    assert source.outcome is not None
    if source.outcome.cause is Cause.UPSTREAM:
        return _canceled(Cause.UPSTREAM, source.outcome.error)
    error = source.outcome.error
    said = error if len(error) <= _ROOT_CHARS else f"{error[:_ROOT_CHARS]} [...]"
    return _canceled(Cause.UPSTREAM, f"{name_of(source)} did not end DONE: {said}")


_ROOT_CHARS = 300
