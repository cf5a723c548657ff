"""Decides which worker, and which node, gets which task."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from rhapsody_mcp.backends.base import BeforeStart, Ended, Report, Returned, Running
from rhapsody_mcp.backends.compute.in_flight import Channel, InFlightTask, Node, Worker
from rhapsody_mcp.backends.compute.outcomes import finished, lost, stopped
from rhapsody_mcp.backends.compute.start_gate import StartGate
from rhapsody_mcp.engine.messages import (
    CancelTask,
    FunctionFinished,
    Interrupt,
    RunFunction,
    StartTask,
    StartWorker,
    StopWorker,
    WorkerExited,
)
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, TaskRun
from rhapsody_mcp.model.states import Cause

__all__ = ["Dispatcher"]

_STOPPED_PER_TURN = 250  # ended tasks in one turn of the event loop: about 5 ms
_QUICK_S = 0.005  # a worker with quicker functions gets several at once
_MOST_SENT = 64
_MOST_SENT_BYTES = 1024 * 1024  # the service holds what a worker has not read twice
_SOON_S = 0.005


class Dispatcher:
    """Takes tasks, and what the nodes and workers of one engine tell of them; it runs in the event loop.

    A native function goes to a worker, which runs one at a time. Each other task goes to the node with the most free
    slots, as soon as the first in the queue finds enough of them. With `bundles` a worker is started for a bundle of
    functions and ends with it. A worker that exits is handed to `on_exit` with the tasks that it had: `on_exit` sees to
    it that each is finished or requeued. `stop_grace_s` is between an interrupt and the end of its worker.
    """

    def __init__(
        self,
        *,
        on_exit: Callable[[Sequence[InFlightTask], WorkerExited], object],
        before_start: BeforeStart | None = None,
        bundles: bool = False,
        stop_grace_s: float = 2.0,
    ) -> None:
        self.nodes: list[Node] = []
        self.tasks: dict[str, InFlightTask] = {}
        """Every task that has not ended, by uid."""
        self.is_halted = False
        self._on_exit, self._bundles, self._stop_grace_s = on_exit, bundles, stop_grace_s
        self._gate = StartGate(before_start)
        self._workers: dict[str, Worker] = {}
        self._worker_count = 0
        self._functions: deque[InFlightTask] = deque()
        self._others: deque[InFlightTask] = deque()
        self._reports_soon = False

    # --- nodes and workers

    def add_node(self, node: Node) -> None:
        self.nodes.append(node)
        if self._bundles:
            self._pump()
            return
        for _ in range(node.slots):
            self._start_worker(node)

    def _start_worker(self, node: Node) -> None:
        self._worker_count += 1
        worker = Worker(str(self._worker_count), node, _MOST_SENT if self._bundles else 1)
        self._workers[worker.name] = node.workers[worker.name] = worker
        node.send(StartWorker(worker.name))

    def _remove(self, worker: Worker) -> None:
        del self._workers[worker.name], worker.node.workers[worker.name]

    @property
    def all_workers_ready(self) -> bool:
        return all(worker.function_channel is not None for worker in self._workers.values())

    def worker_ready(self, name: str, tasks: Channel) -> bool:
        """A worker takes functions through this channel; False where no worker has this name any more."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.function_channel = tasks
        self._pump()
        if not self._bundles:
            self._recall_unstarted()
        return True

    def worker_listening(self, name: str, control: Channel) -> None:
        """A worker takes interrupts through this channel."""
        if name in self._workers:
            self._workers[name].control_channel = control

    def worker_disconnected(self, name: str, tasks: Channel) -> None:
        worker = self._workers.get(name)
        if worker is not None and worker.function_channel is tasks:
            worker.function_channel = None
            self._hand_over_tasks(worker)

    def worker_exited(self, message: WorkerExited) -> None:
        worker = self._workers[message.worker]
        worker.exit = message
        self._hand_over_tasks(worker)

    def _hand_over_tasks(self, worker: Worker) -> None:
        """Once a worker has exited and all its messages are received, replace it and hand its tasks over."""
        if worker.exit is None or worker.function_channel is not None:
            return
        self._remove(worker)
        tasks = list(worker.assigned.values())
        for task in tasks:
            task.worker, task.is_sent = None, False
        self._on_exit(tasks, worker.exit)
        if not self.is_halted and not self._bundles:
            self._start_worker(worker.node)
        self._pump()

    def worker_failed(self, name: str) -> bool:
        """A worker could not be started; whether there are others."""
        self._remove(self._workers[name])
        return bool(self._workers)

    # --- tasks come and go

    def submit(self, task_runs: Iterable[TaskRun], report: Report) -> None:
        for task_run in task_runs:
            task = InFlightTask(task_run, report)
            self.tasks[task.uid] = task
            (self._functions if task.runs_in_worker else self._others).append(task)
        self._pump()

    def stop(self, uids: Iterable[str], cause: Cause) -> None:
        """Ask for tasks to end, because they are canceled or their time is up."""
        stopping = [task for uid in uids if (task := self.tasks.get(uid)) is not None and task.stop_cause is None]
        for task in stopping:
            task.stop_cause = cause
        queued = [task for queue in (self._functions, self._others) for task in _take_stopped(queue)]
        self._finish_stopped(queued)
        uids_left = {task.uid for task in stopping} - {task.uid for task in queued}
        for worker in dict.fromkeys(task.worker for task in stopping if task.worker is not None):
            self._stop_assigned(worker, uids_left)
        for task in stopping:
            if task.uid in uids_left and task.node is not None and task.is_sent:
                task.node.send(CancelTask(task.uid))

    def _finish_stopped(self, queued: list[InFlightTask]) -> None:
        """Finish these tasks, the first of many now and the others in later turns of the event loop."""
        for task in queued[:_STOPPED_PER_TURN]:
            self.finish(task, stopped(task))
        if rest := queued[_STOPPED_PER_TURN:]:
            asyncio.get_running_loop().call_soon(self._finish_stopped, rest)

    def _stop_assigned(self, worker: Worker, uids: Collection[str]) -> None:
        """The task that runs comes last: none of the others starts in its place."""
        for task in reversed([task for task in worker.assigned.values() if task.uid in uids]):
            if task.is_sent:
                self._interrupt(task, worker)
            else:
                del worker.assigned[task.uid]
                self.finish(task, stopped(task))

    def _interrupt(self, task: InFlightTask, worker: Worker) -> None:
        """First an exception inside the function; where that does not help, its worker is replaced."""
        if worker.control_channel is not None:
            worker.control_channel.send(Interrupt(task.uid))
        asyncio.get_running_loop().call_later(self._stop_grace_s, self._stop_worker_of, task, worker)

    def _stop_worker_of(self, task: InFlightTask, worker: Worker) -> None:
        if task.uid in worker.assigned:
            worker.node.send(StopWorker(worker.name))

    def finish(self, task: InFlightTask, outcome: Outcome) -> None:
        """Report the end of a task, unless that was reported before."""
        if self.tasks.pop(task.uid, None) is not None:
            if task.timer is not None:
                task.timer.cancel()
            task.report(Ended(task.uid, outcome))

    def requeue(self, tasks: Sequence[InFlightTask]) -> None:
        """Give these tasks, in order, to other workers before all that wait, unless they have ended."""
        for task in reversed([task for task in tasks if task.uid in self.tasks]):
            self._requeue(task)
        self._pump()

    def _requeue(self, task: InFlightTask) -> None:
        if task.stop_cause is not None:
            self.finish(task, stopped(task))
        else:
            self._functions.appendleft(task)

    # --- the end of the engine

    def halt(self) -> None:
        """Give nothing to anybody any more."""
        self.is_halted = True

    def mark_canceled(self) -> None:
        """Have each task end CANCELED that has not ended."""
        for task in self.tasks.values():
            task.stop_cause = task.stop_cause or Cause.CANCELED

    def abandon(self, reason: str, noted_starts: Collection[tuple[str, int]]) -> None:
        """End every task, or return it where it has not started; nothing of the engine runs any more."""
        for task in list(self.tasks.values()):
            if task.stop_cause is not None:
                self.finish(task, stopped(task))
            elif task.has_started(noted_starts):
                self.finish(task, lost(task, reason))
            else:
                del self.tasks[task.uid]
                task.report(Returned(task.uid, reason))

    # --- who gets what

    def _pump(self) -> None:
        """Give workers and nodes what they have room for."""
        if self.is_halted:
            return
        if self._bundles:
            self._start_workers_for_bundles()
        for worker in self._workers.values():
            if self._functions and worker.is_ready:
                self._feed(worker)
        while self._others and (node := self._roomiest_node(self._others[0])) is not None:
            task = self._others.popleft()
            task.node = node
            node.used_slots += node.slots_for(task)
            self._gate.let_through([task], self._others, partial(self._start, task, node))

    def _roomiest_node(self, task: InFlightTask) -> Node | None:
        """The node with the most free slots of those with room for this task."""
        with_room = (node for node in self.nodes if node.has_room_for(task))
        return max(with_room, key=lambda node: node.free_slots, default=None)

    def _start(self, task: InFlightTask, node: Node) -> None:
        if task.uid not in self.tasks or node.agent is None:
            return
        if task.stop_cause is not None:
            self._end_on_node(task, stopped(task))
            return
        task.is_sent = True
        node.send(StartTask(task.task_run))

    def _end_on_node(self, task: InFlightTask, outcome: Outcome) -> None:
        if task.node is not None:
            task.node.used_slots -= task.node.slots_for(task)
        self.finish(task, outcome)
        self._pump()

    def _start_workers_for_bundles(self) -> None:
        """Start a worker for each bundle that waits; it gets its bundle when it is ready."""
        bundles = -(-len(self._functions) // _MOST_SENT)
        coming = sum(not worker.assigned for worker in self._workers.values())
        for node in _by_turns(self.nodes, bundles - coming):
            self._start_worker(node)

    def _feed(self, worker: Worker) -> None:
        fair = -(-len(self._functions) // max(1, len(self._workers)))
        room = max(0, min(worker.window, max(1, fair)) - len(worker.assigned))
        share: list[InFlightTask] = []
        size = 0
        while self._functions and len(share) < room and size < _MOST_SENT_BYTES:
            task = self._functions.popleft()
            size += task.size
            share.append(task)
            task.worker = worker
            worker.assigned[task.uid] = task
        if share:
            self._gate.let_through(share, self._functions, partial(self._send, worker, share))

    def _send(self, worker: Worker, share: Iterable[InFlightTask]) -> None:
        """Send the tasks of the share that are still this worker's."""
        if worker.function_channel is None:
            return
        messages: list[object] = []
        for task in share:
            task_run, work = task.task_run, task.task_run.spec.work
            assert isinstance(work, Call)
            if worker.assigned.get(task.uid) is task:
                task.is_sent = True
                messages.append(RunFunction(task.uid, work, task_run.bindings, task_run.folder, task_run.attempt))
        if messages:
            worker.function_channel.send(*messages)
        else:  # all were canceled meanwhile
            self._pump()

    def _recall_unstarted(self) -> None:
        """Where a worker has nothing to do, recall tasks from others that have several and have not started them."""
        workers = self._workers.values()
        if self._functions or not any(not worker.assigned and worker.function_channel for worker in workers):
            return
        for worker in workers:
            if len(worker.assigned) > 1 and worker.control_channel is not None and not worker.recalled:
                worker.recalled = {task.uid for task in list(worker.assigned.values())[1:] if task.is_sent}
                worker.control_channel.send(*(Interrupt(uid, running=False) for uid in worker.recalled))

    # --- what becomes of tasks

    def task_started(self, uid: str, at: float) -> None:
        task = self.tasks.get(uid)
        if task is None:
            return
        task.started = at
        if task.worker is None:
            self._report_start(task)
            return
        task.worker.recalled.discard(uid)  # too late to take it back
        task.worker.newest_started = task
        if not self._reports_soon:
            self._reports_soon = True
            asyncio.get_running_loop().call_later(_SOON_S, self._report_starts)

    def _report_starts(self) -> None:
        """Report the functions that run now. One that ends soon nobody could see run, and reports take long."""
        self._reports_soon = False
        for worker in self._workers.values():
            task, worker.newest_started = worker.newest_started, None
            if task is not None and task.uid in worker.assigned:
                self._report_start(task)

    def _report_start(self, task: InFlightTask) -> None:
        assert task.started is not None
        timeout_s = task.task_run.spec.timeout_s
        if task.runs_in_worker and timeout_s is not None:
            left_s = max(0.0, timeout_s - (time.time() - task.started))
            task.timer = asyncio.get_running_loop().call_later(left_s, self.stop, [task.uid], Cause.TIMEOUT)
        task.report(Running(task.uid, task.started))

    def function_finished(self, worker_name: str, message: FunctionFinished) -> None:
        """A worker has run a function to an end; the worker may have exited meanwhile."""
        worker, task = self._workers.get(worker_name), self.tasks.get(message.uid)
        if worker is not None:
            worker.assigned.pop(message.uid, None)
        if task is not None:
            self.finish(task, finished(task, message))
        if worker is not None:
            self._go_on(worker, message)

    def _go_on(self, worker: Worker, message: FunctionFinished) -> None:
        """Find out how much a worker is sent at a time, and send more."""
        if self._bundles:
            self._let_go(worker)
            return
        quick = message.ended - message.started < _QUICK_S
        worker.window = min(worker.window * 2, _MOST_SENT) if quick else 1
        worker.recalled.discard(message.uid)
        if self._functions and not self.is_halted:
            if len(worker.assigned) <= worker.window // 2:
                self._feed(worker)
        elif not worker.assigned:
            self._recall_unstarted()

    def _let_go(self, worker: Worker) -> None:
        """Have a worker end that has run its bundle: it ends where its connection does."""
        if not worker.assigned and worker.function_channel is not None:
            worker.function_channel.close()

    def task_revoked(self, uid: str) -> None:
        """A worker gives this task back; it has not started there, and will not."""
        task = self.tasks.get(uid)
        if task is None or task.worker is None:
            return
        task.worker.assigned.pop(uid, None)
        task.worker.recalled.discard(uid)
        task.worker, task.is_sent = None, False
        self.requeue([task])

    def task_ended(self, uid: str, outcome: Outcome) -> None:
        """A task in processes of its own has ended."""
        if (task := self.tasks.get(uid)) is not None:
            self._end_on_node(task, outcome)


def _take_stopped(queue: deque[InFlightTask]) -> list[InFlightTask]:
    """Take the tasks that are to stop out of the queue; the tasks, in order."""
    taken = [task for task in queue if task.stop_cause is not None]
    if taken:
        kept = [task for task in queue if task.stop_cause is None]
        queue.clear()
        queue.extend(kept)
    return taken


def _by_turns(nodes: Sequence[Node], count: int) -> Iterator[Node]:
    """Up to `count` nodes for one more worker each, always the one with room for the most; the caller adds it."""
    for _ in range(count):
        node = max(nodes, key=lambda node: node.slots - len(node.workers), default=None)
        if node is None or len(node.workers) >= node.slots:
            return
        yield node
