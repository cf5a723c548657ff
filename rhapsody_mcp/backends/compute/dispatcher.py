"""Assigns tasks to workers and nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import count

import msgspec

from rhapsody_mcp.backends.base import BeforeStart, Ended, Report, Returned, Running
from rhapsody_mcp.backends.compute.in_flight import Channel, Hold, InFlightTask, Node, Worker
from rhapsody_mcp.backends.compute.outcomes import finished, lost, stopped
from rhapsody_mcp.backends.compute.process_dispatcher import ProcessDispatcher, RunStep
from rhapsody_mcp.backends.compute.start_gate import StartGate
from rhapsody_mcp.backends.compute.worker_pool import WorkerPool, nodes_with_room
from rhapsody_mcp.backends.priority_queue import PriorityQueue
from rhapsody_mcp.engine.messages import (
    FunctionFinished,
    Interrupt,
    RunFunction,
    StartWorker,
    StopWorker,
    WorkerExited,
)
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, TaskRun
from rhapsody_mcp.model.states import Cause

__all__ = ["Dispatcher"]

_STOPPED_PER_TURN = 250  # stopped tasks that are finished in one turn of the event loop: about 5 ms
_SHORT_S = 0.005  # a worker gets several functions at a time where each takes less than this
_MAX_SENT = 64
_MAX_SENT_BYTES = 1024 * 1024  # the service holds two copies of each message that a worker has not read
_REPORT_DELAY_S = 0.005


class Dispatcher:
    """Assigns the tasks of one engine to its workers and nodes, and reports their starts and ends.

    Every method is called in the event loop. A native function goes to a worker, which runs one function at a time.
    A program or a job starts once its nodes have room for it. Functions and processes share the cores of a node, by
    priority, then in the order of submission. With `bundles`, a worker is started for each bundle of functions and ends
    with the bundle. When a worker exits, `on_exit` gets the worker's tasks and must finish or requeue each.
    `stop_grace_s` is the time between the interrupt of a function and the end of its worker. A program or a job that no
    node can run is refused once `expected_nodes` have joined.
    """

    def __init__(
        self,
        *,
        on_exit: Callable[[Sequence[InFlightTask], WorkerExited], object],
        before_start: BeforeStart | None = None,
        bundles: bool = False,
        stop_grace_s: float = 2.0,
        expected_nodes: int = 1,
        run_step: RunStep | None = None,
    ) -> None:
        self.tasks: dict[str, InFlightTask] = {}
        """Every task that has not ended, by uid."""
        self.is_halted, self._drain_reason = False, ""
        self._on_exit, self._bundles, self._stop_grace_s = on_exit, bundles, stop_grace_s
        self._gate = StartGate(before_start)
        self._workers = WorkerPool(lambda node: self.processes.update(node))
        self.processes = ProcessDispatcher(self._gate, self.finish, expected_nodes, run_step, self._workers.unpark)
        self.processes.on_free = self._assign
        self._names_nodes = expected_nodes > 1
        self._numbers = count()
        self._function_queue: PriorityQueue[InFlightTask] = PriorityQueue()
        self._with_new_start: list[Worker] = []
        """The workers whose newest start is to be reported."""

    # --- nodes and workers

    @property
    def nodes(self) -> Sequence[Node]:
        return self.processes.nodes

    def add_node(self, node: Node) -> None:
        self.processes.add_node(node)
        self._names_nodes |= len(self.nodes) > 1
        for _ in range(0 if self._bundles else node.worker_slots):
            self._start_worker(node)
        self._assign()

    def _start_worker(self, node: Node) -> None:
        worker = self._workers.add(node, _MAX_SENT if self._bundles else 1)
        node.send(StartWorker(worker.name))

    @property
    def all_workers_ready(self) -> bool:
        return self._workers.all_ready

    def worker_ready(self, name: str, tasks: Channel) -> bool:
        """The worker takes functions through the channel `tasks`. False where no worker has this name any more."""
        worker = self._workers.by_name.get(name)
        if worker is None:
            return False
        self._workers.set_ready(worker, tasks)
        self._assign()
        if not self._bundles:
            self._recall_unstarted()
        return True

    def worker_listening(self, name: str, control: Channel) -> None:
        """The worker takes interrupts through the channel `control`."""
        if (worker := self._workers.by_name.get(name)) is not None:
            worker.control_channel = control

    def worker_disconnected(self, name: str, tasks: Channel) -> None:
        worker = self._workers.by_name.get(name)
        if worker is not None and worker.function_channel is tasks:
            worker.function_channel = None
            self._hand_over_tasks(worker)

    def worker_exited(self, message: WorkerExited) -> None:
        if (worker := self._workers.by_name.get(message.worker)) is not None:
            self._gate.process_ended(None if message.why else message.exit_code)
            worker.exit = message
            self._hand_over_tasks(worker)

    def _hand_over_tasks(self, worker: Worker) -> None:
        """Once the worker has exited and its messages are received, pass its tasks to `on_exit`, and replace it."""
        if worker.exit is None or worker.function_channel is not None:
            return
        self._workers.remove(worker)
        tasks, worker.assigned = list(worker.assigned.values()), {}
        for task in tasks:
            task.worker, task.is_sent = None, False
        self._on_exit(tasks, worker.exit)
        if not self.is_halted and not self._bundles:
            self._start_worker(worker.node)
        self._assign()

    def worker_failed(self, name: str) -> bool:
        """The worker could not be started. Returns whether any other worker is left."""
        if (worker := self._workers.by_name.get(name)) is not None:
            self._workers.remove(worker)
        return len(self._workers) > 0

    def lose_node(self, node: Node, reason: str, noted_starts: Collection[tuple[str, int]]) -> None:
        """Take a node with all its workers out of the engine.

        Its tasks that may have started end with cause lost, the others are queued again, first of all. `noted_starts`
        are the starts of functions that were noted in results folders. A second call does nothing.
        """
        if node not in self.nodes:
            return
        tasks = [task for worker in node.workers.values() for task in worker.assigned.values()]
        for worker in list(node.workers.values()):
            self._workers.remove(worker)
            worker.assigned, worker.function_channel = {}, None
        for task in tasks:
            if task.stop_cause is not None or task.has_started(noted_starts):
                self.finish(task, stopped(task) if task.stop_cause else lost(task, reason))
        self.processes.lose_node(node, reason)
        self.requeue(tasks)

    # --- tasks come and go

    def submit(self, task_runs: Iterable[TaskRun], report: Report) -> None:
        for task_run in task_runs:
            task = InFlightTask(task_run, report, next(self._numbers))
            self.tasks[task.uid] = task
            (self._function_queue if task.runs_in_worker else self.processes.queue).append(task)
        self._assign()

    @property
    def _queues(self) -> Sequence[PriorityQueue[InFlightTask]]:
        return self._function_queue, self.processes.queue

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        """Move tasks that wait in a queue, by uid, to these priorities."""
        for queue in self._queues:
            queue.move(lambda task: task.uid in priorities, lambda task: priorities[task.uid])
        for uid in priorities.keys() & self.tasks.keys():  # also those that a worker may give back
            self.tasks[uid].priority = priorities[uid]
        self._assign()

    def stop(self, uids: Iterable[str], cause: Cause) -> None:
        """Ask for these tasks to end; `cause` is CANCELED or TIMEOUT. Unknown and ended uids are ignored."""
        stopping = [task for uid in uids if (task := self.tasks.get(uid)) is not None and task.stop_cause is None]
        for task in stopping:
            task.stop_cause = cause
        queued = [task for queue in self._queues for task in queue.take(lambda task: task.stop_cause is not None)]
        self._finish_stopped(queued)
        uids_left = {task.uid for task in stopping} - {task.uid for task in queued}
        for worker in dict.fromkeys(task.worker for task in stopping if task.worker is not None):
            self._stop_assigned(worker, uids_left)
        for task in stopping:
            if task.uid in uids_left:
                self.processes.stop(task)
        self._assign()

    def _finish_stopped(self, queued: list[InFlightTask]) -> None:
        """Finish these tasks: up to _STOPPED_PER_TURN now, the others in later turns of the event loop."""
        for task in queued[:_STOPPED_PER_TURN]:
            self.finish(task, stopped(task))
        if rest := queued[_STOPPED_PER_TURN:]:
            asyncio.get_running_loop().call_soon(self._finish_stopped, rest)

    def _stop_assigned(self, worker: Worker, uids: Collection[str]) -> None:
        """Stop these tasks of the worker, the running task last, so that no other of them starts in its place."""
        for task in reversed([task for task in worker.assigned.values() if task.uid in uids]):
            if task.is_sent:
                self._interrupt(task, worker)
            else:
                del worker.assigned[task.uid]
                self.finish(task, stopped(task))
        self._workers.note_idle(worker)

    def _interrupt(self, task: InFlightTask, worker: Worker) -> None:
        """Raise an exception in the function; where it still runs after `stop_grace_s`, stop its worker."""
        if worker.control_channel is not None:
            worker.control_channel.send(Interrupt(task.uid))
        asyncio.get_running_loop().call_later(self._stop_grace_s, self._stop_worker_of, task, worker)

    def _stop_worker_of(self, task: InFlightTask, worker: Worker) -> None:
        if task.uid in worker.assigned:
            worker.node.send(StopWorker(worker.name))

    def finish(self, task: InFlightTask, outcome: Outcome) -> None:
        """Report the end of the task. A second call does nothing."""
        if self.tasks.pop(task.uid, None) is not None:
            if task.timer is not None:
                task.timer.cancel()
            if task.nodes and self._names_nodes:
                outcome = msgspec.structs.replace(outcome, nodes=task.nodes)
            task.placement = None
            task.report(Ended(task.uid, outcome))

    def requeue(self, tasks: Sequence[InFlightTask]) -> None:
        """Put the tasks that have not ended at the head of the queue, in this order."""
        for task in reversed([task for task in tasks if task.uid in self.tasks]):
            self._requeue(task)
        self._assign()

    def _requeue(self, task: InFlightTask) -> None:
        if task.stop_cause is not None:
            self.finish(task, stopped(task))
        elif self._drain_reason:
            self._return(task, self._drain_reason)
        else:
            task.take_back()
            self._function_queue.appendleft(task)

    # --- the end of the engine

    def drain(self, reason: str) -> None:
        """Start no further task: return those that have not started, also those that a worker gives back."""
        self.halt()
        self._drain_reason = reason
        queued = [*self._function_queue, *self.processes.queue, *self.processes.take_held_back()]
        self._function_queue.clear()
        self.processes.queue.clear()
        for worker in self._workers.by_name.values():
            unsent = [task for task in worker.assigned.values() if not task.is_sent]
            for task in unsent:
                del worker.assigned[task.uid]
            queued += unsent
            waiting = [task.uid for task in list(worker.assigned.values())[1:]]
            if waiting and worker.control_channel is not None:
                worker.control_channel.send(*(Interrupt(uid, running=False) for uid in waiting))
        for task in queued:
            self._return(task, reason)

    def _return(self, task: InFlightTask, reason: str) -> None:
        if self.tasks.pop(task.uid, None) is not None:
            task.placement = None
            task.report(Returned(task.uid, reason))

    def halt(self) -> None:
        """Assign no further task."""
        self.is_halted = self.processes.is_halted = True

    def mark_canceled(self) -> None:
        """Let each task that has not ended end CANCELED."""
        for task in self.tasks.values():
            task.stop_cause = task.stop_cause or Cause.CANCELED

    def abandon(self, reason: str, noted_starts: Collection[tuple[str, int]]) -> None:
        """Report each task as ended, or as returned where it has not started. No process of the engine is left."""
        for task in list(self.tasks.values()):
            if task.stop_cause is not None:
                self.finish(task, stopped(task))
            elif task.has_started(noted_starts):
                self.finish(task, lost(task, reason))
            else:
                self._return(task, reason)

    # --- who gets what

    def _assign(self) -> None:
        """Give out what is free, to functions and processes in their order."""
        if self.processes.is_waiting:
            if self._function_queue.size and self.processes.queue.size:
                self._assign_functions(before=self.processes.queue.first())
            self.processes.assign()
        self._assign_functions()

    def _assign_functions(self, before: InFlightTask | None = None) -> None:
        """Assign queued functions, or those that come before a process, to idle workers; a busy worker gets further
        functions when one of its own ends."""
        if self.is_halted:
            return
        if self._bundles:
            self._start_workers_for_bundles()
        queue = self._function_queue
        while queue.size and (before is None or queue.first().comes_before(before)):
            if (worker := self._workers.first_idle()) is None:
                return
            self._feed_worker(worker)

    def _start_workers_for_bundles(self) -> None:
        """Start a worker for each waiting bundle; the worker gets its bundle when it is ready."""
        bundles = -(-len(self._function_queue) // _MAX_SENT)
        starting = sum(not worker.assigned for worker in self._workers.by_name.values())
        for node in nodes_with_room(self.nodes, bundles - starting):
            self._start_worker(node)

    def _feed_worker(self, worker: Worker) -> None:
        fair_share = -(-self._function_queue.size // max(1, len(self._workers)))
        room = max(0, min(worker.window, max(1, fair_share)) - len(worker.assigned))
        share: list[InFlightTask] = []
        size = 0
        queue = self._function_queue
        while queue.size and len(share) < room and size < _MAX_SENT_BYTES:
            task = queue.popleft()
            if task.uid not in self.tasks:  # its end came after all, from a node that was taken for lost
                continue
            size += task.size
            share.append(task)
            task.worker = worker
            worker.assigned[task.uid] = task
        if share:
            self._workers.give_core(worker)
            self._gate.let_through(share, self._function_queue, partial(self._send, worker, share))

    def _send(self, worker: Worker, share: Iterable[InFlightTask]) -> None:
        """Send those tasks of `share` that are still assigned to the worker."""
        if worker.function_channel is None or self.is_halted:
            return
        messages: list[object] = []
        for task in share:
            run, work = task.task_run, task.task_run.spec.work
            assert isinstance(work, Call)
            if worker.assigned.get(task.uid) is task:
                task.is_sent, task.nodes = True, worker.node.names
                messages.append(
                    RunFunction(task.uid, work, run.bindings, run.results_folder, run.attempt, run.variables)
                )
        if messages:
            self._workers.note_holding(worker)
            worker.function_channel.send(*messages)
        else:  # all tasks were canceled meanwhile
            self._assign()

    def _recall_unstarted(self) -> None:
        """Where a worker is idle and no function is queued, recall tasks that wait in other workers."""
        if self._function_queue or self._workers.first_idle() is None:
            return
        for worker in self._workers.take_holding():
            assert worker.control_channel is not None
            worker.recalled = {task.uid for task in list(worker.assigned.values())[1:] if task.is_sent}
            worker.control_channel.send(*(Interrupt(uid, running=False) for uid in worker.recalled))

    # --- what becomes of tasks

    def task_started(self, uid: str, at: float) -> None:
        task = self.tasks.get(uid)
        if task is None:
            return
        if task.worker is None:
            if task.started is None:  # the ranks on other nodes start later
                task.started = at
                self._report_start(task)
            return
        task.started = at
        task.worker.recalled.discard(uid)  # too late to recall the task
        if not self._with_new_start:
            asyncio.get_running_loop().call_later(_REPORT_DELAY_S, self._report_starts)
        if task.worker.newest_started is None:
            self._with_new_start.append(task.worker)
        task.worker.newest_started = task

    def _report_starts(self) -> None:
        """Report the functions that run now. The starts of ended functions are not reported, which saves time."""
        workers, self._with_new_start = self._with_new_start, []
        for worker in workers:
            task, worker.newest_started = worker.newest_started, None
            if task is not None and task.uid in worker.assigned:
                self._report_start(task)

    def _report_start(self, task: InFlightTask) -> None:
        assert task.started is not None
        timeout_s = task.task_run.spec.timeout_s
        if task.runs_in_worker and timeout_s is not None:
            left_s = max(0.0, timeout_s - (time.time() - task.started))
            task.timer = asyncio.get_running_loop().call_later(left_s, self.stop, [task.uid], Cause.TIMEOUT)
        task.report(Running(task.uid, task.started, task.nodes if self._names_nodes else (), task.worker_number))

    def function_finished(self, worker_name: str, message: FunctionFinished) -> None:
        """A function has ended in a worker, which may have exited meanwhile."""
        worker, task = self._workers.by_name.get(worker_name), self.tasks.get(message.uid)
        if worker is not None:
            worker.assigned.pop(message.uid, None)
        if task is not None:
            self.finish(task, finished(task, message))
        if worker is not None:
            self._adjust_and_feed(worker, message)

    def _adjust_and_feed(self, worker: Worker, message: FunctionFinished) -> None:
        """Set how many functions the worker may have at a time, and send it more functions."""
        if self._bundles:
            if not worker.assigned and worker.function_channel is not None:
                worker.function_channel.close()  # the worker has run its bundle; it exits then
            return
        worker.window = min(worker.window * 2, _MAX_SENT) if message.ended - message.started < _SHORT_S else 1
        worker.recalled.discard(message.uid)
        waiting = self.processes.queue.size
        if self._function_queue.size and not self.is_halted and not (waiting and self._yields(worker)):
            if len(worker.assigned) <= worker.window // 2:
                self._feed_worker(worker)
        elif not worker.assigned:
            self._workers.note_idle(worker)
            self._assign()
            self._recall_unstarted()

    def _yields(self, worker: Worker) -> bool:
        """Whether a program or a job, some of which wait, is to have the core of the worker before more functions."""
        return worker.node.hold is Hold.ALL or self.processes.queue.first().comes_before(self._function_queue.first())

    def task_revoked(self, uid: str) -> None:
        """The worker gives this task back: the task has not started there and never will."""
        task = self.tasks.get(uid)
        if task is None or task.worker is None:
            return
        task.worker.assigned.pop(uid, None)
        task.worker.recalled.discard(uid)
        self._workers.note_idle(task.worker)
        self.requeue([task])

    def task_ended(self, node: Node, uid: str, outcome: Outcome) -> None:
        """A program, or the ranks of a job on this node, have ended."""
        if (task := self.tasks.get(uid)) is not None:
            self._gate.process_ended(outcome.exit_code if outcome.cause in (Cause.CRASHED, Cause.EXIT_CODE) else None)
            self.processes.ended_on(node, task, outcome)
