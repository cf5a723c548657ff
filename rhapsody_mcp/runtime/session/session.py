"""The session: the Python API for submitting, waiting for and canceling tasks."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

from msgspec import to_builtins

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, SessionClosed, UnknownName
from rhapsody_mcp.model.live.output import OutputQuery, Printed
from rhapsody_mcp.model.sampling import check_integer
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.statistics import Statistics
from rhapsody_mcp.runtime.dataflow.graph import refuse_cycles
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from rhapsody_mcp.runtime.limits import Limits
from rhapsody_mcp.runtime.process_layout import read_software
from rhapsody_mcp.runtime.session.acceptance import AcceptedTask
from rhapsody_mcp.runtime.session.again import JoinsResults, tasks_to_run_again
from rhapsody_mcp.runtime.session.managed_backend import EngineNotice
from rhapsody_mcp.runtime.session.queue_positions import queued_before
from rhapsody_mcp.runtime.session.statistics import StatisticsCollector
from rhapsody_mcp.runtime.session.task_runner import TaskRunner
from rhapsody_mcp.runtime.tasks import MOST_PRIORITY, Task, leaves, name_of, with_children
from rhapsody_mcp.runtime.telemetry.telemetry import configured_telemetry

__all__ = ["Session"]

_uids = itertools.count(1)
_LONGEST_DELAY_S = 60.0
_MAX_NOTICES = 100
_NAMES_SHOWN = 5


class Session:
    """Runs tasks on one or more backends.

    Leaving `async with session`, or `close()`, cancels unfinished tasks and stops the backends.
    """

    def __init__(
        self,
        backends: Sequence[Backend] = (),
        uid: str | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        *,
        opens_results: bool = True,
        engine_idle_s: float | None = None,
        folder: str | Path | None = None,
        limits: Limits | None = None,
        software: Mapping[str, Any] | None = None,
        package_cache: PackageCache | None = None,
    ) -> None:
        """The default `uid` is a name such as "session.0001". `work_dir` is the working directory of tasks without a
        cwd; the directory is created where it is missing, and the default is the current directory. Raises
        InvalidRequest for a `work_dir` where a backend has started already.

        With `opens_results=False`, results stay encoded, so that no user code runs in this process.

        `folder` holds long results and outlives the session; the default is a temporary folder. With `engine_idle_s`,
        a backend stops its engine after this many seconds without a running or waiting task, until the next task.
        `limits` are the limits of a server. `software` holds the keys python, packages, container and setup of
        `task_backend_specific_kwargs` for functions and programs that name none. `package_cache` makes the environments
        for packages; the default is in the user's cache folder.
        """
        try:
            names = [backend.name for backend in backends]
        except (TypeError, AttributeError):
            raise InvalidRequest(
                "backends is a list of backends, as in Session(backends=[await LocalExecutionBackend()])."
            ) from None
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise InvalidRequest(f"two backends are named {duplicates.pop()!r}; give one another name (name=...).")
        self.uid = uid or f"session.{next(_uids):04d}"
        self.work_dir = None if work_dir is None else os.path.abspath(work_dir)
        if self.work_dir is not None:
            os.makedirs(self.work_dir, exist_ok=True)
            for backend in backends:
                backend.work_in(self.work_dir)
        self.software = read_software(software or {})
        self._telemetry = configured_telemetry(self.uid)
        self._runner = TaskRunner(
            backends,
            opens_results=opens_results,
            engine_idle_s=engine_idle_s,
            folder=Path(folder) if folder is not None else None,
            limits=limits,
            on_change=self._handle_change,
            on_progress=self._handle_progress,
            notify=lambda notice: self.notices.append(notice),
            software=self.software,
            package_cache=package_cache or PackageCache(None, self.work_dir or ""),
            telemetry=self._telemetry,
        )
        self._submitted: list[Task] = []
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.usage = self._runner.usage
        self.ended = self._runner.ended
        """Every end of a task, in order; a ForEach is after its children. Of a task that ran again, the end at its
        `position` counts, and the ones before do not."""
        self.replaced: list[Task] = []
        """The tasks whose name a later task has taken."""
        self.rewrites = 0
        """How often ended tasks ran again or were replaced: each time, what was counted of `ended` no longer holds."""
        self._statistics = StatisticsCollector(self.ended, self._runner.unfinished, self._runner.tasks)
        self.on_change: set[Callable[[Task], object]] = set()
        """Called after each change of a task's state. A start that is reported together with the end is no change."""
        self.on_progress: set[Callable[[Task], object]] = set()
        """Called after a running task has told its progress."""
        self.watchers: set[Callable[[], None]] = set()
        """Called after each change of a task's state, and after a running task has told its progress."""
        self.notices: deque[EngineNotice] = deque(maxlen=_MAX_NOTICES)
        """The latest notices: an engine was lost, restarted, or stopped because it was idle."""

    def _handle_change(self, task: Task) -> None:
        if task.state.final:
            self._statistics.add_ended()
        if self._telemetry is not None:
            self._telemetry.note_change(task)
        for listener in self.on_change:
            listener(task)
        if self.watchers:
            self._call_watchers()

    def _handle_progress(self, task: Task) -> None:
        for listener in self.on_progress:
            listener(task)
        self._call_watchers()

    def _call_watchers(self) -> None:
        for watcher in self.watchers:
            watcher()

    # --- contents

    @property
    def tasks(self) -> list[Task]:
        """Every task, in the order of submission, without the children of a ForEach."""
        return list(self._submitted)

    def tasks_from(self, number: int, count: int) -> list[Task]:
        """At most `count` of the `tasks`, from this number on."""
        return self._submitted[number : number + count]

    @property
    def task_count(self) -> int:
        """The number of `tasks`."""
        return len(self._submitted)

    @property
    def backends(self) -> list[Backend]:
        return [managed.backend for managed in self._runner.backends.values()]

    @property
    def engines(self) -> dict[str, str]:
        """What the engine of each backend does now, for users, by backend; without backends that report nothing."""
        return {name: managed.progress for name, managed in self._runner.backends.items() if managed.progress}

    @property
    def closed(self) -> bool:
        return self._runner.closed

    @property
    def folder(self) -> Path:
        """The folder of results that are too long for a message."""
        return self._runner.folder

    @property
    def counts(self) -> dict[str, int]:
        """The number of tasks in each state, apart from it the skipped ones. The children stand for a ForEach; replaced
        tasks do not count."""
        return dict(Counter(task.counted_as for task in leaves(self._current)))

    @property
    def unfinished(self) -> Mapping[str, Task]:
        """The tasks that have not ended, by uid; among them each child of a ForEach, and internal tasks."""
        return self._runner.unfinished

    @property
    def _current(self) -> list[Task]:
        return [task for task in self._submitted if task.replaced_by is None]

    def get_statistics(self, group: str | None = None) -> Statistics:
        """Counts, times, rates and the critical path of this session's tasks, or of one group of them, now.

        Groups and everything else are as `Statistics` and `summarise` of `rhapsody_mcp.model.statistics` say; replaced
        tasks are left out. Raises UnknownName where no task is in such a group.
        """
        return self._statistics.compute(self.backends, group)

    def replace(self, task: Task, uid: str) -> None:
        """Record that the task with `uid` has taken the name of an ended task, which counts no longer."""
        task.replaced_by = uid
        self.replaced.append(task)
        self._statistics.discard(task)
        self.rewrites += 1

    # --- submission

    async def submit_tasks(self, tasks: Iterable[Task] | Task) -> list[asyncio.Future[Task]]:
        """Submit all of the tasks or none, and return a future for each, in order.

        A future ends with its task, and its result is the task; awaiting it raises what awaiting the task raises.
        Raises InvalidTask, UnknownName or SessionClosed with no task submitted. Backends that have not started
        start now; tasks are QUEUED meanwhile.
        """
        self._refuse_other_loop()
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        accepted = self.accept(batch)
        refuse_cycles(batch)
        self._runner.submit(accepted)
        self._submitted += batch
        return [task.future for task in batch]

    async def retry(
        self, tasks: Iterable[Task] | Task, record: Callable[[Sequence[Task]], Awaitable[None]] | None = None
    ) -> list[Task]:
        """Run tasks again, in place, that ended FAILED or CANCELED, and return all tasks that run again.

        Of a ForEach, its tasks that did not end well run again. So does what the tasks need and did not get, and what
        was canceled because of them. Of these tasks, one that is DONE runs again where one of its sources does, or did
        since. Attempts go on counting; each task has all its `retries` anew. `record` is awaited before anything
        changes. Raises InvalidTask where nothing is to run again, or one of the tasks cannot.
        """
        self._refuse_other_loop()
        named = [tasks] if isinstance(tasks, Task) else list(tasks)
        async with self._runner.step_lock:
            again, more = list[Task](), self.plan_retry(named)
            while len(more) > len(again):  # a for_each may end while the others are recorded
                again = more
                accepted = self._runner.acceptance.accept_again(again)
                if record is not None:
                    await record(again)
                more = await self._plan_retry_later(named)
            self._statistics.count_anew()
            self.rewrites += 1
            await self._runner.run_again(accepted)
        return again

    def prioritize(self, tasks: Iterable[Task] | Task, priority: int) -> list[Task]:
        """Give tasks another priority, a ForEach with its tasks; the result are those of them that have not ended.

        Tasks that run already go on. Raises InvalidTask where all of the tasks have ended.
        """
        named = [tasks] if isinstance(tasks, Task) else list(tasks)
        priority = check_integer("priority", priority, least=-MOST_PRIORITY, most=MOST_PRIORITY)
        if not (waiting := [task for task in with_children(named) if not task.state.final]):
            raise InvalidTask(f"nothing waits: {_states_text(named)}.", field="priority")
        self._runner.prioritize(waiting, priority)
        return waiting

    def queued_before(self, tasks: Iterable[Task]) -> dict[str, int]:
        """By uid, how many tasks of its backend come before each of these tasks that are QUEUED: those that run, and
        those that wait with a higher priority, or with the same one for longer."""
        return queued_before(tasks, self._runner.queued.values(), self._runner.unfinished.values())

    async def _plan_retry_later(self, tasks: Sequence[Task]) -> list[Task]:
        """As `plan_retry`, once no ForEach puts its results together: part of the plan is recorded already."""
        while True:
            try:
                return self.plan_retry(tasks)
            except JoinsResults as error:
                await asyncio.wait([error.parent.future])

    def plan_retry(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks that `retry` would run again, each ForEach after its children. Raises what `retry` raises."""
        self._refuse_closed()
        if again := tasks_to_run_again(tasks, self._submitted):
            return again
        raise InvalidTask(
            f"nothing is to run again: {_states_text(tasks)}. What FAILED or was CANCELED runs again; a skipped task "
            "does with the task of its condition, or is submitted again under its name."
        )

    def accept(self, tasks: Sequence[Task]) -> list[AcceptedTask]:
        """Check tasks for `submit_accepted`, without submitting them. Raises what `submit_tasks` raises.

        The tasks must have no cycle.
        """
        self._refuse_closed()
        return self._runner.acceptance.accept(tasks)

    def refuse_count(self, count: int) -> None:
        """Raise LimitExceeded where `count` further tasks are too many."""
        self._runner.acceptance.refuse_count(count)

    async def submit_accepted(self, tasks: Sequence[Task], accepted: Sequence[AcceptedTask]) -> None:
        """Submit accepted tasks in steps; all of them are submitted when this returns. Must not be cancelled.

        Nothing else may be submitted meanwhile. Raises SessionClosed, with no task submitted.
        """
        async with self._runner.step_lock:
            self._refuse_closed()
            self._submitted += tasks
            await self._runner.submit_in_steps(accepted)

    async def run_hidden(self, task: Task) -> Task:
        """Run an internal task, which no list or count shows, and return it when it has ended.

        Raises what `submit_tasks` raises.
        """
        self._refuse_closed()
        return await self._runner.run_hidden(task)

    async def wait_expanded(self, tasks: Iterable[Task]) -> None:
        """Return when each ForEach among the tasks whose items are an available result has its children; where a worker
        has to read the result, within a second."""
        await self._runner.for_each.wait_expanded(tasks)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise SessionClosed("this session is closed; open another one with Session(backends=[...]).")

    def _refuse_other_loop(self) -> None:
        """Raise InvalidRequest in another event loop than that of the session's backends and tasks."""
        loop = asyncio.get_running_loop()
        if (self._loop or loop) is not loop:
            raise InvalidRequest(
                "this session lives in the event loop of an asyncio.run() that is not this one, where its tasks cannot "
                "be waited for. Do all of its work inside one asyncio.run(), or open another session here."
            )
        self._loop = loop

    def restore(self, tasks: Sequence[Task], ended: Sequence[Task], unreadable: Mapping[str, str]) -> None:
        """Add the tasks of a previous run to this session, which has no task yet.

        `ended` are the tasks that had ended, in the order of their ends; they stay as they are. The other tasks are NEW
        and run. A task that cannot run ends FAILED with cause invalid; `unreadable` has reasons for this, by uid.
        """
        self._submitted += tasks
        with nullcontext() if self._telemetry is None else self._telemetry.restoring():
            self._runner.restore(list(with_children(tasks)), ended, unreadable)

    def software_of(self, task: Task) -> dict[str, Any]:
        """The software that the task runs with, as keys of `task_backend_specific_kwargs`; empty for a prompt."""
        return dict(to_builtins(self._runner.acceptance.software_of(task)))

    # --- looking at running tasks

    async def read_output(self, task: Task, query: OutputQuery = OutputQuery()) -> Printed | None:  # noqa: B008
        """A piece of what a running task has printed so far: of stdout and of stderr.

        What was flushed is there within a second. None where the task does not run, or is a prompt.
        """
        if task.state is not TaskState.RUNNING or task.backend not in self._runner.backends:
            return None
        return await self._runner.backends[task.backend].backend.read_output(task.uid, query)

    # --- waiting, canceling and closing

    async def wait_tasks(self, tasks: Iterable[Task] | Task, timeout: float | None = None) -> list[Task]:
        """Wait until each of these tasks has ended, and return them in order. Never raises for a failed task.

        Raises TimeoutError after `timeout` seconds; the tasks continue.
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
        """Cancel tasks and wait until each task and its processes have ended. Ended tasks stay as they are."""
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        for task in batch:
            if task.uid not in self._runner.tasks:
                raise UnknownName("task", task.uid, self._runner.tasks)
        cancellation = self._runner.cancel([*leaves(batch), *batch], "canceled on request")
        await asyncio.shield(self._runner.spawn(cancellation))
        return await self.wait_tasks(batch)

    async def close(self) -> None:
        """Cancel unfinished tasks, stop the backends, and delete the temporary files of the session.

        Returns when no process is left. A second call waits for the first. Ended tasks keep their results.
        """
        self._refuse_other_loop()
        if self._closing is None:
            self._runner.closed = True
            self._closing = asyncio.create_task(self._runner.close())
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _states_text(tasks: Sequence[Task]) -> str:
    states = ", ".join(f"{name_of(task)} is {task.counted_as}" for task in tasks[:_NAMES_SHOWN])
    return states + (f" and {len(tasks) - _NAMES_SHOWN} more" if len(tasks) > _NAMES_SHOWN else "")
