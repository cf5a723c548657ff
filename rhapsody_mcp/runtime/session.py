"""The session: takes tasks, feeds results from one to the next, hands them to backends, keeps account."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from rhapsody_mcp.backends.base import Backend, Ended, Event, Kind, Running
from rhapsody_mcp.engine.folders import Folder
from rhapsody_mcp.model.errors import (
    BackendError,
    BackendUnavailable,
    InvalidRequest,
    InvalidTask,
    RhapsodyError,
    SessionClosed,
    UnknownName,
)
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Order, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.statistics import Statistics, summarise
from rhapsody_mcp.model.values import Reader, load, load_json
from rhapsody_mcp.runtime.encoding import Encoder
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Task, rank_of, reference

__all__ = ["Session"]

_log = logging.getLogger(__name__)


class Session:
    """Runs tasks on one or more backends.

    Leaving `async with session`, or `close()`, cancels what has not ended and stops the backends.
    """

    def __init__(self, backends: Sequence[Backend] = (), *, opens_results: bool = True) -> None:
        """`opens_results=False` is for a process in which no user code may run: results stay encoded."""
        names = [backend.name for backend in backends]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidRequest(f"two backends are named {twice.pop()!r}; give one another name (name=...).")
        self._lanes = {backend.name: _Lane(backend) for backend in backends}
        self._read: Reader = load if opens_results else load_json
        self._opens_results = opens_results
        self._tasks: dict[str, Task] = {}
        self._specs: dict[str, TaskSpec] = {}
        self._missing: dict[str, set[str]] = {}
        self._dependents: dict[str, list[str]] = {}
        self._folder: Folder | None = None
        self._closing: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

    # --- what there is

    @property
    def tasks(self) -> list[Task]:
        """Every task, in the order of submission."""
        return list(self._tasks.values())

    @property
    def backends(self) -> list[Backend]:
        return [lane.backend for lane in self._lanes.values()]

    @property
    def closed(self) -> bool:
        return self._closing is not None

    def get_statistics(self) -> Statistics:
        """Counts and average times of this session's tasks, now."""
        return summarise(task.timing for task in self._tasks.values())

    # --- submission

    async def submit_tasks(self, tasks: Iterable[Task]) -> list[asyncio.Future[Task]]:
        """Take these tasks, whole or not at all, and give a future for each, in order.

        A future ends with its task and then gives the task; awaiting it raises as awaiting the task does.
        Raises InvalidTask, UnknownName or SessionClosed with nothing taken. Backends that have not been started
        start now; tasks are QUEUED meanwhile.
        """
        if self.closed:
            raise SessionClosed("this session is closed; open another one with Session(backends=[...]).")
        batch = list(tasks)
        accepted = self._accept(batch)
        for task, lane, spec in accepted:
            self._register(task, lane, spec)
        self._queue([task for task in batch if not self._missing.get(task.uid)])
        return [task.future for task in batch]

    def _accept(self, batch: list[Task]) -> list[tuple[Task, _Lane, TaskSpec]]:
        uids = {}
        for task in batch:
            if not isinstance(task, Task):
                raise InvalidTask(f"submit_tasks takes ComputeTask and AITask objects, not a {type(task).__name__}.")
            if task.state is not TaskState.NEW or task.uid in self._tasks or task.uid in uids:
                raise InvalidTask(f"{task.uid} is submitted already; make a new task for a new run.")
            uids[task.uid] = task
        for task in batch:
            for source in task.sources():
                if source.uid not in uids and source.uid not in self._tasks:
                    raise InvalidTask(
                        f"{task.uid} needs the result of {source.uid}, which is not in this session: "
                        "submit both in one call, or that one first."
                    )
        _refuse_cycles(uids)
        encoder = Encoder(reference)
        return [self._checked(task, encoder) for task in batch]

    def _checked(self, task: Task, encoder: Encoder) -> tuple[Task, _Lane, TaskSpec]:
        lane = self._route(task)
        try:
            spec = task.spec(encoder)
            lane.backend.check(spec)
        except InvalidTask as error:
            raise InvalidTask(f"{task.name or task.uid}: {error}") from error
        return task, lane, spec

    def _route(self, task: Task) -> _Lane:
        kind = kind_of(task)
        able = [lane for lane in self._lanes.values() if kind in lane.backend.kinds]
        if task.backend is None:
            if not able:
                raise InvalidTask(f"{task.name or task.uid} is a {kind}, and no backend of this session runs one.")
            return able[0]
        lane = self._lanes.get(task.backend)
        if lane is None:
            raise UnknownName("backend", task.backend, self._lanes)
        if lane not in able:
            others = ", ".join(repr(other.backend.name) for other in able) or "none here"
            named = task.name or task.uid
            raise InvalidTask(f"{named} is a {kind}, which backend {task.backend!r} does not run; {others} does.")
        return lane

    def _register(self, task: Task, lane: _Lane, spec: TaskSpec) -> None:
        task.backend = lane.backend.name
        task.submitted = time.time()
        task.state = TaskState.WAITING
        task._future = asyncio.get_running_loop().create_future()
        task._future.add_done_callback(_retrieve)
        self._tasks[task.uid] = task
        self._specs[task.uid] = spec
        sources = {source.uid for source in task.sources()}
        unfinished = {uid for uid in sources if uid not in self._tasks or not self._tasks[uid].state.final}
        self._missing[task.uid] = unfinished
        for uid in unfinished:
            self._dependents.setdefault(uid, []).append(task.uid)

    # --- from task to task

    def _queue(self, tasks: Iterable[Task]) -> None:
        """Hand tasks whose sources have ended to their backends."""
        by_lane: dict[str, list[Order]] = {}
        for task in tasks:
            if failed := self._failed_source(task):
                self._end(task, _canceled(Cause.UPSTREAM, f"{failed.name or failed.uid} did not end DONE"))
                continue
            task.state = TaskState.QUEUED
            by_lane.setdefault(task.backend or "", []).append(self._order(task))
        for name, orders in by_lane.items():
            self._hand_over(self._lanes[name], orders)

    def _failed_source(self, task: Task) -> Task | None:
        return next((source for source in task.sources() if source.state is not TaskState.DONE), None)

    def _order(self, task: Task) -> Order:
        bindings = {}
        for source in task.sources():
            if source.outcome is not None and source.outcome.value is not None:
                bindings[source.uid] = source.outcome.value
        return Order(spec=self._specs[task.uid], bindings=bindings, folder=str(self.folder))

    @property
    def folder(self) -> Path:
        """Where results that are too long for a message lie until the session is closed."""
        if self._folder is None:
            self._folder = Folder()
        return self._folder.path

    def _hand_over(self, lane: _Lane, orders: list[Order]) -> None:
        if lane.ready:
            try:
                lane.backend.submit(orders, self._report, self._read)
                return
            except BackendUnavailable:  # its engine has died since; it gets a new one
                lane.ready = False
        lane.pending.extend(orders)
        if lane.opening is None:
            lane.opening = asyncio.create_task(self._open(lane))

    async def _open(self, lane: _Lane) -> None:
        try:
            await lane.backend.start()
            orders, lane.pending = lane.pending, []
            lane.backend.submit(orders, self._report, self._read)
            lane.ready = True
        except RhapsodyError as error:
            cause = Cause.LOST if isinstance(error, BackendError) else Cause.INVALID
            self._refuse(lane, cause, f"backend {lane.backend.name!r} did not start: {error}")
        except Exception as error:  # a fault of the backend must not leave its tasks waiting for ever
            _log.exception("backend %r did not start", lane.backend.name)
            self._refuse(lane, Cause.LOST, f"backend {lane.backend.name!r} failed to start: {error!r}")
        finally:
            lane.opening = None

    def _refuse(self, lane: _Lane, cause: Cause, message: str) -> None:
        orders, lane.pending = lane.pending, []
        for order in orders:
            outcome = Outcome(state=TaskState.FAILED, ended=time.time(), cause=cause, error=message)
            self._end(self._tasks[order.spec.uid], outcome)

    # --- what backends report

    def _report(self, event: Event) -> None:
        task = self._tasks[event.uid]
        if task.state.final:
            return
        if isinstance(event, Running):
            task.state, task.started = TaskState.RUNNING, event.at
        elif self._opens_results and _is_long(event):
            self._spawn(self._open_long_result(task, event.outcome))
        elif self._opens_results:
            self._end(task, self._opened(task, event.outcome))
        else:
            self._end(task, event.outcome)

    async def _open_long_result(self, task: Task, outcome: Outcome) -> None:
        opened = await asyncio.to_thread(self._opened, task, outcome)
        if not task.state.final:
            self._end(task, opened)

    def _opened(self, task: Task, outcome: Outcome) -> Outcome:
        """Give the task what its user sees; a result that cannot be opened here makes it FAILED."""
        task.stdout, task.stderr = outcome.stdout.read(), outcome.stderr.read()
        try:
            task.ranks = [rank_of(rank, self._read) for rank in outcome.ranks]
            task.return_value = None if outcome.value is None else self._read(outcome.value)
        except Exception as error:  # unpickling runs the user's own code
            message = f"its result cannot be opened here: {type(error).__name__}: {error}"
            return Outcome(state=TaskState.FAILED, ended=outcome.ended, cause=Cause.ERROR, error=message)
        return outcome

    def _end(self, task: Task, outcome: Outcome) -> None:
        """Give a task its final state, then everything that hangs on it its next one."""
        ended = deque([(task, outcome)])
        ready: list[Task] = []
        while ended:
            task, outcome = ended.popleft()
            if task.state.final:
                continue
            task.outcome, task.state, task.started = outcome, outcome.state, outcome.started
            _settle(task)
            for uid in self._dependents.pop(task.uid, ()):
                missing = self._missing[uid]
                missing.discard(task.uid)
                dependent = self._tasks[uid]
                if outcome.state is not TaskState.DONE:
                    message = f"{task.name or task.uid} did not end DONE: {outcome.error}"
                    ended.append((dependent, _canceled(Cause.UPSTREAM, message)))
                elif not missing and not dependent.state.final:
                    ready.append(dependent)
        if ready and not self.closed:
            self._queue(ready)

    # --- waiting, canceling, closing

    async def wait_tasks(self, tasks: Iterable[Task], timeout: float | None = None) -> list[Task]:
        """Wait until each of these tasks has ended, and give them back in order. Never raises for a task.

        Raises TimeoutError after `timeout` seconds; the tasks go on.
        """
        batch = list(tasks)
        futures = {task.future for task in batch}
        if futures:
            _, pending = await asyncio.wait(futures, timeout=timeout)
            if pending:
                raise TimeoutError(f"{len(pending)} of {len(futures)} tasks have not ended after {timeout} s")
        return batch

    async def cancel(self, tasks: Iterable[Task] | Task) -> list[Task]:
        """Cancel tasks and wait until each has ended, its processes too. Ended tasks stay as they are."""
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        for task in batch:
            if task.uid not in self._tasks:
                raise UnknownName("task", task.uid, self._tasks)
        self._cancel(batch, "canceled on request")
        return await self.wait_tasks(batch)

    def _cancel(self, tasks: Collection[Task], message: str) -> None:
        by_lane: dict[str, set[str]] = {}
        for task in tasks:
            by_lane.setdefault(task.backend or "", set()).add(task.uid)
        for name, uids in by_lane.items():
            lane = self._lanes[name]
            held = {order.spec.uid for order in lane.pending}
            lane.pending = [order for order in lane.pending if order.spec.uid not in uids]
            for uid in uids:
                if uid in held or self._tasks[uid].state is TaskState.WAITING:
                    self._end(self._tasks[uid], _canceled(Cause.CANCELED, message))
            if lane.ready:
                lane.backend.cancel({uid for uid in uids if not self._tasks[uid].state.final})

    async def close(self) -> None:
        """Cancel what has not ended, stop the backends, and delete the session's files.

        Returns when nothing is left running. A second call waits for the first. Finished tasks keep their
        results.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        message = "its session was closed"
        self._cancel([task for task in self._tasks.values() if not task.state.final], message)
        openings = [lane.opening for lane in self._lanes.values() if lane.opening]
        for opening in openings:
            opening.cancel()
        await asyncio.gather(*openings, return_exceptions=True)
        failures = await asyncio.gather(*(backend.close() for backend in self.backends), return_exceptions=True)
        await asyncio.gather(*self._background, return_exceptions=True)
        for task in self._tasks.values():
            self._end(task, _canceled(Cause.CANCELED, message))
        if self._folder is not None:
            self._folder.remove()
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class _Lane:
    """A backend with the orders that wait for it to start."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.ready = False
        self.opening: asyncio.Task[None] | None = None
        self.pending: list[Order] = []


def kind_of(task: Task) -> Kind:
    """What a backend must be able to run for this task."""
    if isinstance(task, AITask):
        return "prompt"
    return "function" if isinstance(task, ComputeTask) and task.function is not None else "executable"


def _refuse_cycles(batch: dict[str, Task]) -> None:
    """Raise InvalidTask where tasks of one submission wait for each other in a circle."""
    missing = {uid: {source.uid for source in task.sources() if source.uid in batch} for uid, task in batch.items()}
    needed_by: dict[str, list[str]] = {}
    for uid, sources in missing.items():
        for source in sources:
            needed_by.setdefault(source, []).append(uid)
    free = deque(uid for uid, sources in missing.items() if not sources)
    while free:
        done = free.popleft()
        del missing[done]
        for uid in needed_by.get(done, ()):
            missing[uid].discard(done)
            if not missing[uid]:
                free.append(uid)
    if missing:
        names = ", ".join(batch[uid].name or uid for uid in list(missing)[:10])
        raise InvalidTask(f"these tasks wait for each other in a circle: {names}. Remove one of the references.")


def _settle(task: Task) -> None:
    future = task.future
    if future.done():
        return
    error = task.exception
    if error is None:
        future.set_result(task)
    else:
        future.set_exception(error)


def _retrieve(future: asyncio.Future[Task]) -> None:
    """A failure that nobody awaits is no news: it stands in the task."""
    if not future.cancelled():
        future.exception()


def _is_long(event: Ended) -> bool:
    value = event.outcome.value
    return value is not None and value.file is not None


def _canceled(cause: Cause, message: str) -> Outcome:
    return Outcome(state=TaskState.CANCELED, ended=time.time(), cause=cause, error=message)
