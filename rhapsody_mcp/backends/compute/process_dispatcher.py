"""Assigns programs and jobs to the slots of nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rhapsody_mcp.backends.compute.free_slots import FreeSlots
from rhapsody_mcp.backends.compute.in_flight import InFlightTask, Node, Placement
from rhapsody_mcp.backends.compute.job_parts import JobPart, failed_rank, merged
from rhapsody_mcp.backends.compute.outcomes import lost, refused, stopped
from rhapsody_mcp.backends.compute.placement import place
from rhapsody_mcp.backends.compute.start_gate import StartGate
from rhapsody_mcp.backends.priority_queue import PriorityQueue
from rhapsody_mcp.engine.messages import CancelTask, StartTask
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Layout
from rhapsody_mcp.model.states import Cause, TaskState

__all__ = ["ProcessDispatcher", "RunStep"]

RunStep = Callable[[str, Sequence[tuple[Node, str]]], object]
"""Starts a step of the scheduler for the task with this uid: for each rank, in order, its node and its script."""


class ProcessDispatcher:
    """Starts programs and jobs in the order of their queue, each once it has all its slots, and merges their parts.

    `finish` gets each task with its outcome. Until `expected_nodes` have joined, a task that no node can run waits, and
    so does a job with more ranks than slots.
    """

    def __init__(
        self,
        gate: StartGate,
        finish: Callable[[InFlightTask, Outcome], object],
        expected_nodes: int,
        run_step: RunStep | None = None,
    ) -> None:
        self.nodes: list[Node] = []
        self.queue: PriorityQueue[InFlightTask] = PriorityQueue()
        self.is_halted = False
        self._free_slots = FreeSlots()
        self.expected_nodes = expected_nodes
        self._gate, self._finish, self._run_step = gate, finish, run_step
        self._lost: dict[str, tuple[Node, str]] = {}
        """The nodes that are gone for good, by name, with the reason."""
        self._away: dict[str, Node] = {}
        """The nodes that were lost and may be added again."""

    def add_node(self, node: Node) -> None:
        self.nodes.append(node)
        self._free_slots.add(node)
        self._lost.pop(node.name, None)
        self._away.pop(node.name, None)

    def assign(self) -> None:
        """Start queued tasks while there are slots for them."""
        while self.queue and self.nodes and not self.is_halted and self._assign_next():
            pass

    def _assign_next(self) -> bool:
        """Start or refuse the first task of the queue. False where the task has to wait."""
        task = self.queue[0]
        layout = task.task_run.spec.layout
        is_complete = not self._away and len(self.nodes) + len(self._lost) >= self.expected_nodes
        try:
            ranks = self._place(layout)
        except InvalidTask as error:
            if not is_complete:
                return False
            self.queue.popleft()
            self._finish(task, self._unplaceable(task, str(error)))
            return True
        if ranks is None or (not is_complete and layout.ranks > sum(node.slots for node in self.nodes)):
            return False
        self.queue.popleft()
        task.placement = Placement(ranks)
        for node in ranks:
            node.reserve(task, len(ranks[node]))
            self._free_slots.update(node)
        self._gate.let_through([task], self.queue, partial(self._start, task, task.placement))
        return True

    def _unplaceable(self, task: InFlightTask, error: str) -> Outcome:
        """The outcome of a task that never fits on these nodes: lost where it would with the nodes that were lost."""
        all_nodes = [*self.nodes, *(node for node, _ in self._lost.values())]
        try:
            place(task.task_run.spec.layout, all_nodes, mpi_over_nodes=self._run_step is not None)
        except InvalidTask:
            return refused(error)
        return lost(task, f"{error} It had more: {'; '.join(reason for _, reason in self._lost.values())}")

    def _place(self, layout: Layout) -> Mapping[Node, tuple[int, ...]] | None:
        """As `place`, which looks at all nodes; a task that fits on the node with the most free slots needs no look."""
        ranks = layout.ranks
        if ranks <= (layout.ranks_per_node or ranks) and not any(group.template.host_name for group in layout.groups):
            node = self._free_slots.roomiest()
            if node is not None and ranks <= node.free_slots:
                return {node: tuple(range(ranks))}
            if ranks == 1:
                return None
        return place(layout, self.nodes, mpi_over_nodes=self._run_step is not None)

    def _start(self, task: InFlightTask, placement: Placement) -> None:
        if task.placement is not placement or any(node.agent is None for node in placement.ranks):
            return
        if task.stop_cause is not None:
            self._release(task, placement)
            self._finish(task, stopped(task))
            self.assign()
            return
        task.is_sent = True
        task.nodes = tuple(node.name for node in placement.ranks)
        for node, ranks in placement.ranks.items():
            own_ranks = ranks if len(placement.ranks) > 1 else ()
            node.send(StartTask(task.task_run, own_ranks, task.nodes, self._is_in_step(task)))

    def _is_in_step(self, task: InFlightTask) -> bool:
        return self._run_step is not None and task.task_run.spec.layout.uses_mpi

    def ranks_prepared(self, node: Node, task: InFlightTask, scripts: Mapping[int, str]) -> None:
        """A node has prepared its ranks of a task; start the step once all nodes have."""
        placement = task.placement
        if placement is None or self._run_step is None:
            return
        placement.scripts |= {rank: (node, script) for rank, script in scripts.items()}
        if len(placement.scripts) == task.task_run.spec.layout.ranks:
            self._run_step(task.uid, [placement.scripts[rank] for rank in sorted(placement.scripts)])

    def _release(self, task: InFlightTask, placement: Placement) -> None:
        for node in placement.running:
            self._release_on(node, task, placement)

    def _release_on(self, node: Node, task: InFlightTask, placement: Placement) -> None:
        node.release(task, len(placement.ranks[node]))
        self._free_slots.update(node)

    def stop(self, task: InFlightTask) -> None:
        """Ask the nodes of a task to end it; does nothing for a task that no node was asked to start."""
        if task.placement is not None and task.is_sent:
            for node in task.placement.running:
                node.send(CancelTask(task.uid))

    def ended_on(self, node: Node, task: InFlightTask, outcome: Outcome) -> None:
        """The ranks of the task on this node have ended."""
        placement = task.placement
        if placement is None or node not in placement.running:
            return
        placement.outcomes[node] = outcome
        self._release_on(node, task, placement)
        if placement.running:
            self._end_others(task, placement, node)
        else:
            failed_first = placement.failed_first.name if placement.failed_first else None
            self._finish(task, merged([_part(placement, node) for node in placement.ranks], failed_first))
        self.assign()

    def _end_others(self, task: InFlightTask, placement: Placement, node: Node) -> None:
        """Where a job cannot go on without the ranks that have ended, end its other ranks."""
        outcome = placement.outcomes[node]
        if outcome.cause is Cause.TIMEOUT:
            self.stop(task)
        elif outcome.state is TaskState.FAILED and placement.failed_first is None:
            if outcome.ranks and not task.task_run.spec.layout.uses_mpi:
                return  # independent ranks go on without each other, as they do on one node
            placement.failed_first = node
            for other in placement.running:
                other.send(CancelTask(task.uid, failed_rank(_part(placement, node))))

    def lose_node(self, node: Node, reason: str) -> None:
        """Finish the tasks of a node that is gone which may have started, and queue the others again. Tasks that no
        other node can run wait until the node is added again, or given up."""
        node.agent = None
        self.nodes.remove(node)
        self._free_slots.remove(node)
        self._away[node.name] = node
        tasks = list(node.process_tasks.values())
        for task in reversed([task for task in tasks if not task.is_sent]):
            self._requeue(task)
        for task in [task for task in tasks if task.is_sent]:
            self.ended_on(node, task, stopped(task) if task.stop_cause else lost(task, reason))
        self.assign()

    def give_up_node(self, name: str, reason: str) -> None:
        """A node that was lost does not come back. Does nothing for a node that never was there."""
        if (node := self._away.pop(name, None)) is not None:
            self._lost[name] = node, reason
            self.assign()

    def _requeue(self, task: InFlightTask) -> None:
        assert task.placement is not None
        self._release(task, task.placement)
        task.take_back()
        if task.stop_cause is not None:
            self._finish(task, stopped(task))
        else:
            self.queue.appendleft(task)


def _part(placement: Placement, node: Node) -> JobPart:
    return JobPart(node.name, placement.ranks[node], placement.outcomes[node])
