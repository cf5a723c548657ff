"""Runs the tasks of one session: waits for sources, submits to backends, retries, and ends tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from rhapsody_mcp.backends.base import Backend, Ended, Progressed, Running
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.outcome import Outcome, canceled, failed
from rhapsody_mcp.model.specs import Software, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import NOTHING, Reader, load, load_json
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from rhapsody_mcp.runtime.limits import Limits, SessionUsage
from rhapsody_mcp.runtime.serialization import Encoder
from rhapsody_mcp.runtime.session.acceptance import Acceptance, AcceptedTask
from rhapsody_mcp.runtime.session.again import forget_end
from rhapsody_mcp.runtime.session.conditions import Conditions
from rhapsody_mcp.runtime.session.dependencies import Dependencies
from rhapsody_mcp.runtime.session.for_each import ForEachRunner
from rhapsody_mcp.runtime.session.managed_backend import EngineNotice, ManagedBackend
from rhapsody_mcp.runtime.session.outcomes import canceled_by_upstream, open_results, with_attempts, with_progress
from rhapsody_mcp.runtime.session.preparation import Preparation
from rhapsody_mcp.runtime.session.steps import TASKS_PER_STEP, steps
from rhapsody_mcp.runtime.tasks import MOST_PRIORITY, ForEach, Task, is_hidden, reference
from rhapsody_mcp.runtime.telemetry.telemetry import Telemetry

__all__ = ["TaskRunner"]

_MAX_RETRY_DELAY_S = 60.0


class TaskRunner:
    """Holds every task of a session and moves each from state to state.

    `tasks` are all tasks by uid. `unfinished` are the tasks that have not ended, and `ended` the others, in the order
    of their ends, a ForEach after its children; a task that ran again is there once for each end. An internal task is
    only in `tasks` and `unfinished`, until it ends.
    `on_change` is called after each change of a task's state, and `on_progress` after a task has told its progress. A
    start that is reported together with the end is no change.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        opens_results: bool,
        engine_idle_s: float | None,
        folder: Path | None,
        limits: Limits | None,
        on_change: Callable[[Task], None],
        on_progress: Callable[[Task], None],
        notify: Callable[[EngineNotice], None],
        software: Software,
        package_cache: PackageCache,
        telemetry: Telemetry | None,
    ) -> None:
        self.tasks: dict[str, Task] = {}
        self.unfinished: dict[str, Task] = {}
        self.queued: dict[str, Task] = {}
        """The tasks that a backend has and that do not run, in the order in which it got them."""
        self.ended: list[Task] = []
        self.usage, self.closed = SessionUsage(), False
        self._on_change, self._on_progress, self._notify_engine = on_change, on_progress, notify
        self._read: Reader = load if opens_results else load_json
        self._opens_results, self._limits, self._telemetry = opens_results, limits, telemetry
        self.backends = {backend.name: self._manage(backend, engine_idle_s) for backend in backends}
        self.acceptance = Acceptance(self.backends, self.tasks, limits, self.usage, software)
        self.for_each = ForEachRunner(self, limits.settings.max_result_bytes if limits else None)
        self._conditions, self._preparation = Conditions(self), Preparation(self, package_cache)
        self.specs: dict[str, TaskSpec] = {}
        self._dependencies, self._hidden_count = Dependencies(), 0
        self._retry_timers: dict[str, asyncio.TimerHandle] = {}
        self.step_lock = asyncio.Lock()
        """Held while tasks are submitted in steps: a cancel waits until all of them are submitted."""
        self._folder = folder.absolute() if folder is not None else None
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for backend in backends:
                backend.keep_in(self._folder)
        self._temporary: RunDir | None = None
        self._background: set[asyncio.Task[None]] = set()

    def _manage(self, backend: Backend, idle_s: float | None) -> ManagedBackend:
        return ManagedBackend(
            backend,
            self._handle_event,
            self._read,
            notify=self._notify_engine,
            is_needed=lambda: any(task.backend == backend.name for task in self.unfinished.values()),
            idle_s=idle_s,
        )

    # --- submitting

    async def submit_in_steps(self, accepted: Sequence[AcceptedTask]) -> None:
        now = time.time()
        for task, _, _ in accepted:
            task.state, task.submitted = TaskState.WAITING, task.submitted or now
        for step in steps(sorted(accepted, key=AcceptedTask.order)):
            self.submit(step)
            await asyncio.sleep(0)

    def submit(self, accepted: Sequence[AcceptedTask]) -> None:
        for task, managed, spec in accepted:
            self._add_unfinished(task, managed, spec)
        self.queue([task for task, _, _ in accepted if self.is_ready(task)])

    def _add_unfinished(self, task: Task, managed: ManagedBackend | None, spec: TaskSpec | None) -> None:
        self._add(task, managed, spec)
        task.submitted = task.submitted or time.time()
        task.state = TaskState.WAITING
        if isinstance(task, ForEach) and (task.source is None or task.children):
            self.for_each.watch(task)
        else:
            self._dependencies.add(task)
        self._notify(task)

    def _add_ended(self, task: Task, managed: ManagedBackend | None, spec: TaskSpec | None) -> None:
        """Add a task that ended in a previous run."""
        self._add(task, managed, spec)
        if spec is not None:
            self.usage.end(task.outcome or canceled(Cause.LOST, ""))
        task.complete_future()

    def _add(self, task: Task, managed: ManagedBackend | None, spec: TaskSpec | None) -> None:
        if managed is not None and spec is not None:
            task.backend, self.specs[task.uid] = managed.backend.name, spec
            if not is_hidden(task):
                self.usage.add(spec)
        self.tasks[task.uid] = task
        if not task.state.final:
            self.unfinished[task.uid] = task
        for source in task.needs():
            source.passed_on = True

    async def run_again(self, accepted: Sequence[AcceptedTask]) -> None:
        """Run ended tasks again, a ForEach after its children. The caller holds `step_lock`."""
        for task, _, spec in accepted:
            if spec is not None and task.outcome is not None:
                self.usage.forget(spec, task.outcome)
            forget_end(task, time.time())
        for task, _, _ in accepted:
            if task.parent is not None and task.parent.uid in self.unfinished:
                self.for_each.count(task.parent)
        again = {task.uid for task, _, _ in accepted}
        for task in self.unfinished.values():
            if task.state is TaskState.WAITING and any(source.uid in again for source in task.sources()):
                self._dependencies.add(task)
        await self.submit_in_steps(accepted)

    def restore(self, tasks: Sequence[Task], ended: Sequence[Task], unreadable: Mapping[str, str]) -> None:
        """Add the tasks of a previous run, as `Session.restore` says. `tasks` has each ForEach after its children."""
        self.ended += ended
        for position, task in enumerate(self.ended):
            task.position = position
        encoder, refused = Encoder(reference), dict(unreadable)
        for task in tasks:
            accepted = AcceptedTask(task)
            try:
                accepted = self.acceptance.accept_restored(task, encoder)
            except RhapsodyError as error:
                refused.setdefault(task.uid, str(error))
            (self._add_ended if task.state.final else self._add_unfinished)(*accepted)
        unfinished = [task for task in tasks if not task.state.final]
        for task in [task for task in unfinished if task.uid in refused]:
            self.end(task, failed(Cause.INVALID, refused[task.uid]))
        self.queue([task for task in unfinished if self.is_ready(task)])

    async def run_hidden(self, task: Task) -> Task:
        """Run an internal task, which no list or count shows, and return it when it has ended.

        Raises what `submit_tasks` raises.
        """
        self._hidden_count += 1
        task.uid = f"~{self._hidden_count}"
        task.priority = MOST_PRIORITY  # a reply, or a task that could start, waits for it
        self.submit(self.acceptance.accept_hidden([task]))
        try:
            await asyncio.wait([task.future])
        except asyncio.CancelledError:
            for withdrawn, _ in self._withdraw([task]):
                self.end(withdrawn, canceled(Cause.CANCELED, "nobody waits for it"))
            raise
        return task

    # --- queueing

    def is_ready(self, task: Task) -> bool:
        is_open = task.uid in self.unfinished and task.state is TaskState.WAITING
        return is_open and not self._dependencies.is_waiting(task)

    def queue(self, tasks: Sequence[Task]) -> None:
        """Submit ready tasks to their backends: the first step at once, the others in later steps."""
        if any(task.priority for task in tasks):
            tasks = sorted(tasks, key=lambda task: -task.priority)
        self._submit_to_backends(tasks[:TASKS_PER_STEP])
        if len(tasks) > TASKS_PER_STEP:
            self.spawn(self._queue_in_steps(tasks[TASKS_PER_STEP:]))

    async def _queue_in_steps(self, tasks: Sequence[Task]) -> None:
        for step in steps(tasks):
            await asyncio.sleep(0)
            if not self.closed:
                self._submit_to_backends([task for task in step if self.is_ready(task)])

    def _submit_to_backends(self, tasks: Sequence[Task]) -> None:
        by_backend: dict[str, list[TaskRun]] = {}
        folder = str(self.folder)
        for task in tasks:
            if source := self._failed_source(task):
                self.end(task, canceled_by_upstream(source))
                continue
            if task.when is not None and task.state is TaskState.WAITING and not self._conditions.lets_run(task):
                continue
            task.state = TaskState.QUEUED
            self._notify(task)
            if isinstance(task, ForEach):
                self.for_each.start(task)
                continue
            if self.specs[task.uid].layout.software.packages:
                self._preparation.hold(task)
                continue
            task.attempts += 1
            self.queued[task.uid] = task
            by_backend.setdefault(task.backend or "", []).append(self._task_run(task, folder))
        for name, task_runs in by_backend.items():
            self.backends[name].submit(task_runs)

    def _failed_source(self, task: Task) -> Task | None:
        for source in task.sources() if task.on_upstream_failure == "cancel" else ():
            if source.state is not TaskState.DONE:
                return source
        return None

    def _task_run(self, task: Task, folder: str) -> TaskRun:
        bindings = {source.uid: (source.outcome and source.outcome.value) or NOTHING for source in task.needs()}
        if is_resumed := task.is_resumed:
            task.is_resumed = False
        spec, attempt = self.specs[task.uid], max(1, task.attempts)
        run = TaskRun(spec=spec, bindings=bindings, results_folder=folder, attempt=attempt, resumed=is_resumed)
        return run if self._telemetry is None else self._telemetry.traced(task, run)

    @property
    def folder(self) -> Path:
        """The folder of results that are too long for a message."""
        if self._folder is None:
            self._temporary = RunDir()
            self._folder = self._temporary.path
        return self._folder

    async def submit_children(self, parent: ForEach, items: Sequence[Any]) -> None:
        """Make the children of a ForEach and submit them in steps. Raises InvalidTask and LimitExceeded."""
        async with self.step_lock:
            if parent.state.final:
                return
            accept = self.acceptance.accept_children
            # in a service `make` is no user code and may run in a thread
            if len(items) > TASKS_PER_STEP and not self._opens_results:
                accepted = await asyncio.to_thread(accept, parent, items)
            else:
                accepted = accept(parent, items)
            self.for_each.watch(parent)
            await self.submit_in_steps(accepted)

    # --- events of backends

    def _handle_event(self, event: Running | Progressed | Ended) -> None:
        task = self.tasks[event.uid]
        if task.state.final:
            return
        if not isinstance(event, Ended):
            self._handle_sign_of_life(task, event)
            return
        outcome = event.outcome
        if self._limits is not None and outcome.cause is Cause.TIMEOUT:
            requested_s = getattr(task, "task_backend_specific_kwargs", {}).get("timeout")
            outcome = self._limits.explain_timeout(outcome, requested_s)
        if outcome.started is not None:
            self._set_parent_running(task, outcome.started)
        if self._should_retry(task, outcome):
            self._schedule_retry(task, outcome)
        elif not self._opens_results:
            self.end(task, outcome)
        elif outcome.value is not None and outcome.value.file is not None:
            self.spawn(self._open_long_result(task, outcome))
        else:
            self.end(task, open_results(task, outcome, self._read, self.specs[task.uid].layout.software))

    def _handle_sign_of_life(self, task: Task, event: Running | Progressed) -> None:
        if isinstance(event, Progressed):
            task.progress = event.progress
            self._on_progress(task)
            return
        if event.nodes or event.worker is not None:
            task.placed_on, task.started_in = event.nodes, event.worker
        self._set_running(task, event.at)
        self._set_parent_running(task, event.at)

    def _set_running(self, task: Task, at: float) -> None:
        task.state, task.started = TaskState.RUNNING, at
        self.queued.pop(task.uid, None)
        self._notify(task)

    def _set_parent_running(self, task: Task, at: float) -> None:
        if task.parent is not None and task.parent.state is TaskState.QUEUED:
            self._set_running(task.parent, at)

    def _should_retry(self, task: Task, outcome: Outcome) -> bool:
        failed = outcome.state is TaskState.FAILED and outcome.cause is not Cause.INVALID
        return failed and task.attempts < task.most_attempts and not self.closed

    def _schedule_retry(self, task: Task, outcome: Outcome) -> None:
        if self._telemetry is not None:
            self._telemetry.end_attempt(task, outcome)
        task.state, task.started = TaskState.QUEUED, None
        task.forget_progress()
        task.last_failure = f"attempt {task.attempts} ended with cause {outcome.cause}: {outcome.error}"
        delay_s = min(task.retry_delay_s * 2.0 ** (task.attempts - task.earlier_attempts - 1), _MAX_RETRY_DELAY_S)
        self._retry_timers[task.uid] = asyncio.get_running_loop().call_later(delay_s, self._retry, task)
        self._notify(task)

    def _retry(self, task: Task) -> None:
        del self._retry_timers[task.uid]
        self.queue([task])

    async def _open_long_result(self, task: Task, outcome: Outcome) -> None:
        opened = await asyncio.to_thread(open_results, task, outcome, self._read, self.specs[task.uid].layout.software)
        if not task.state.final:
            self.end(task, opened)

    def end(self, task: Task, outcome: Outcome) -> None:
        """Give a task its final state, and each task that waits for it its next state."""
        ending, ready = [(task, outcome)], list[Task]()
        for task, outcome in ending:  # the list grows in the loop
            if task.state.final:
                continue
            outcome = with_attempts(task, outcome)
            if task.progress is not None or outcome.progress is not None:
                outcome = with_progress(task, outcome)
            task.outcome, task.state, task.started = outcome, outcome.state, outcome.started
            self._finish(task)
            task.complete_future()
            self._notify(task)
            if task.parent is not None:
                self.for_each.child_has_ended(task.parent)
            for uid, has_all in self._dependencies.pop_dependents(task).items():
                dependent = self.tasks[uid]
                if outcome.state is not TaskState.DONE and dependent.on_upstream_failure == "cancel":
                    ending.append((dependent, canceled_by_upstream(task)))
                elif has_all and not dependent.state.final:
                    ready.append(dependent)
        if ready and not self.closed:
            self.queue(ready)

    def _finish(self, task: Task) -> None:
        self._dependencies.forget(task)
        self.unfinished.pop(task.uid, None)
        self.queued.pop(task.uid, None)
        spec = self.specs.pop(task.uid, None)
        if is_hidden(task):
            self.tasks.pop(task.uid, None)
        else:
            task.position = len(self.ended)
            self.ended.append(task)
            if spec is not None and task.outcome is not None:
                self.usage.end(task.outcome)

    def _notify(self, task: Task) -> None:
        if not is_hidden(task):
            self._on_change(task)

    def prioritize(self, tasks: Iterable[Task], priority: int) -> None:
        """Give these tasks, which have not ended, another priority."""
        by_backend: dict[str, dict[str, int]] = {}
        for task in tasks:
            task.priority = priority
            if (spec := self.specs.get(task.uid)) is not None:
                self.specs[task.uid] = replace(spec, priority=priority)
                by_backend.setdefault(task.backend or "", {})[task.uid] = priority
            if self.queued.pop(task.uid, None) is not None:  # it comes after those that have this priority already
                self.queued[task.uid] = task
        for name, priorities in by_backend.items():
            self.backends[name].prioritize(priorities)

    # --- canceling and closing

    async def cancel(self, tasks: Collection[Task], message: str) -> None:
        """Cancel tasks. No pending task among them starts from now on; these end in steps."""
        async with self.step_lock:
            while tasks:
                changed: list[Task] = []
                for step in steps(self._withdraw(tasks)):
                    for task, state in step:
                        if task.state is state:
                            self.end(task, canceled(Cause.CANCELED, message))
                        else:
                            changed.append(task)
                    await asyncio.sleep(0)
                tasks = changed

    def _withdraw(self, tasks: Collection[Task]) -> list[tuple[Task, TaskState]]:
        """Cancel tasks in their backends. Returns the tasks that no backend has, with their states, for `cancel`."""
        ending: list[Task] = []
        by_backend: dict[str, set[str]] = {}
        for task in tasks:
            if isinstance(task, ForEach):
                if not self.for_each.has_open_children(task):  # else the ForEach ends with its last child
                    ending.append(task)
            elif (timer := self._retry_timers.pop(task.uid, None)) is not None:
                timer.cancel()
                ending.append(task)
            elif self._preparation.drop(task):
                ending.append(task)
            else:
                by_backend.setdefault(task.backend or "", set()).add(task.uid)
        for name, uids in by_backend.items():
            withdrawn = self.backends[name].withdraw(uids)
            candidates = map(self.tasks.__getitem__, uids)
            ending += [task for task in candidates if task.uid in withdrawn or task.state is TaskState.WAITING]
            self.backends[name].cancel(uids)
        return [(task, task.state) for task in ending if not task.state.final]

    async def close(self) -> None:
        """End every task and backend, and delete temporary files. Raises the first error of a backend."""
        self.closed = True
        message = "its session was closed"
        await self.cancel(list(self.unfinished.values()), message)
        errors = await asyncio.gather(*(managed.close() for managed in self.backends.values()), return_exceptions=True)
        await asyncio.gather(*self._background, return_exceptions=True)
        for task in list(self.unfinished.values()):
            self.end(task, canceled(Cause.CANCELED, message))
        if self._temporary is not None:
            self._temporary.remove()
        for error in filter(None, errors):
            raise error

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the coroutine in the background; `close` waits for its end."""
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
