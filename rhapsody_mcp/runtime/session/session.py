"""The session: takes tasks, feeds results from one to the next, hands them to backends, keeps account."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.errors import InvalidRequest, SessionClosed, UnknownName
from rhapsody_mcp.model.statistics import Statistics
from rhapsody_mcp.runtime.dataflow.graph import refuse_cycles
from rhapsody_mcp.runtime.limits import Limits
from rhapsody_mcp.runtime.session.acceptance import AcceptedTask
from rhapsody_mcp.runtime.session.managed_backend import EngineNotice
from rhapsody_mcp.runtime.session.statistics import SessionStatistics
from rhapsody_mcp.runtime.session.task_runner import TaskRunner
from rhapsody_mcp.runtime.tasks import Task, leaves, with_children

__all__ = ["Session"]

_uids = itertools.count(1)
_LONGEST_DELAY_S = 60.0
_MAX_NOTICES = 100


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
        limits: Limits | None = None,
    ) -> None:
        """`uid` is a name of its own, in place of one such as "session.0001". In `work_dir`, which is made where it is
        not there, tasks start that have no cwd; default is the current directory. It is for backends that have not
        started: InvalidRequest is raised for one that has.

        `opens_results=False` is for a process in which no user code may run: results stay encoded.

        `folder` is where long results lie, in place of a temporary one; it outlives the session.
        With `engine_idle_s` a backend that has had no task for so long, and for which none waits, stops its engine
        until the next one. `limits` hold the tasks to the settings of a server.
        """
        names = [backend.name for backend in backends]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise InvalidRequest(f"two backends are named {duplicates.pop()!r}; give one another name (name=...).")
        self.uid = uid or f"session.{next(_uids):04d}"
        self.work_dir = None if work_dir is None else os.path.abspath(work_dir)
        if self.work_dir is not None:
            os.makedirs(self.work_dir, exist_ok=True)
            for backend in backends:
                if hasattr(backend, "work_in"):
                    backend.work_in(self.work_dir)
        self._runner = TaskRunner(
            backends,
            opens_results=opens_results,
            engine_idle_s=engine_idle_s,
            folder=folder,
            limits=limits,
            on_change=self._handle_change,
            notify=lambda notice: self.notices.append(notice),
        )
        self._submitted: list[Task] = []
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.usage = self._runner.usage
        self.ended = self._runner.ended
        """Every task that has ended, first ended first; a ForEach after its children."""
        self.replaced: list[Task] = []
        """The tasks that another one took the name of."""
        self._statistics = SessionStatistics(self.ended, self._runner.unfinished, self._runner.tasks)
        self.on_change: Callable[[Task], None] | None = None
        """Called after each change of a task's state; a start that is heard of together with the end is no change."""
        self.notices: deque[EngineNotice] = deque(maxlen=_MAX_NOTICES)
        """The last of what became of the engines: that one ended, was started again, was stopped to rest."""

    def _handle_change(self, task: Task) -> None:
        if task.state.final:
            self._statistics.add_ended()
        if self.on_change is not None:
            self.on_change(task)

    # --- what there is

    @property
    def tasks(self) -> list[Task]:
        """Every task, in the order of submission. The children of a ForEach are in it alone."""
        return list(self._submitted)

    @property
    def task_count(self) -> int:
        """How many these are."""
        return len(self._submitted)

    @property
    def backends(self) -> list[Backend]:
        return [managed.backend for managed in self._runner.backends.values()]

    @property
    def engines(self) -> dict[str, str]:
        """What the engine of each backend does now, in words, for those that say."""
        return {name: managed.progress for name, managed in self._runner.backends.items() if managed.progress}

    @property
    def closed(self) -> bool:
        return self._runner.closed

    @property
    def folder(self) -> Path:
        """Where results that are too long for a message lie."""
        return self._runner.folder

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
        return self._statistics.compute(self.backends, group)

    def replace(self, task: Task, uid: str) -> None:
        """Have a task that ended as one that another took the name of: it does not count any more."""
        task.replaced_by = uid
        self.replaced.append(task)
        self._statistics.discard(task)

    # --- submission

    async def submit_tasks(self, tasks: Iterable[Task] | Task) -> list[asyncio.Future[Task]]:
        """Take these tasks, whole or not at all, and give a future for each, in order.

        A future ends with its task and then gives the task; awaiting it raises as awaiting the task does.
        Raises InvalidTask, UnknownName or SessionClosed with nothing taken. Backends that have not been started
        start now; tasks are QUEUED meanwhile.
        """
        self._refuse_other_loop()
        batch = [tasks] if isinstance(tasks, Task) else list(tasks)
        accepted = self.accept(batch)
        refuse_cycles(batch)
        self._runner.submit(accepted)
        self._submitted += batch
        return [task.future for task in batch]

    def accept(self, tasks: Sequence[Task]) -> list[AcceptedTask]:
        """Raise what `submit_tasks` raises for these tasks, or give what `take` needs; nothing is taken.

        The caller has made sure that no tasks wait for each other in a circle.
        """
        self._refuse_closed()
        return self._runner.acceptance.accept(tasks)

    def refuse_count(self, count: int) -> None:
        """Raise LimitExceeded where so many more tasks are too many."""
        self._runner.acceptance.refuse_count(count)

    async def submit_accepted(self, tasks: Sequence[Task], accepted: Sequence[AcceptedTask]) -> None:
        """Take what was accepted, step by step; it is whole when this returns, and is not to be cancelled.

        In between, nothing else may be submitted. Raises SessionClosed, with nothing taken.
        """
        async with self._runner.submission_lock:
            self._refuse_closed()
            self._submitted += tasks
            await self._runner.submit_in_steps(accepted)

    async def run_hidden(self, task: Task) -> Task:
        """Run a task of this program's own, which no list or count shows, and give it when it has ended.

        Raises what `submit_tasks` raises.
        """
        self._refuse_closed()
        return await self._runner.run_hidden(task)

    async def wait_expanded(self, tasks: Iterable[Task]) -> None:
        """Return when each ForEach among these whose items are a JSON result that is there has its children."""
        await self._runner.for_each.wait_expanded(tasks)

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
        self._runner.restore(list(with_children(tasks)), ended, unreadable)

    # --- waiting, canceling and closing

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
            if task.uid not in self._runner.tasks:
                raise UnknownName("task", task.uid, self._runner.tasks)
        cancellation = self._runner.cancel([*leaves(batch), *batch], "canceled on request")
        await asyncio.shield(self._runner.spawn(cancellation))
        return await self.wait_tasks(batch)

    async def close(self) -> None:
        """Cancel what has not ended, stop the backends, and delete the session's files.

        Returns when nothing is left running. A second call waits for the first. Finished tasks keep their
        results.
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
