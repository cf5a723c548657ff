"""Assigns programs and jobs to nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice

from rhapsody_mcp.backends.compute.free_cores import FreeCores
from rhapsody_mcp.backends.compute.in_flight import Hold, InFlightTask, Node, Placement
from rhapsody_mcp.backends.compute.job_parts import JobPart, failed_rank, merged
from rhapsody_mcp.backends.compute.outcomes import lost, refused, stopped
from rhapsody_mcp.backends.compute.placement import has_devices, nodes_to_hold, place
from rhapsody_mcp.backends.compute.start_gate import StartGate
from rhapsody_mcp.backends.priority_queue import PriorityQueue
from rhapsody_mcp.engine.messages import CancelTask, StartTask
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Layout, Needs
from rhapsody_mcp.model.states import Cause, TaskState

__all__ = ["ProcessDispatcher", "RunStep"]

RunStep = Callable[[str, Sequence[tuple[Node, str]]], object]
"""Starts a step of the scheduler for the task with this uid: for each rank, in order, its node and its script."""


_PATIENCE_S = 10.0
"""How long smaller tasks may start before the first task of the queue, in seconds."""
_LOOKAHEAD = 2000
"""How many tasks of the queue are looked at for one that fills a hole."""


class ProcessDispatcher:
    """Starts programs and jobs, each once there is room for it, and merges their parts.

    The first task of the queue starts as soon as it can. While it waits, tasks behind it fill the room that is too
    small for it; after `patience_s`, or at once for a task of a priority above 0, nodes are held for it. While GPUs or
    memory are missing, tasks that ask for neither start there still; once only cores are missing, no other task does.

    `finish` gets each task with its outcome. `on_room` is called with a node on which cores have become free, or which
    is held no longer. Until `expected_nodes` have joined, a task that no node can run waits, and so does a job with
    more ranks than cores.
    """

    def __init__(
        self,
        gate: StartGate,
        finish: Callable[[InFlightTask, Outcome], object],
        expected_nodes: int,
        run_step: RunStep | None = None,
        on_room: Callable[[Node], object] = lambda node: None,
    ) -> None:
        self.nodes: list[Node] = []
        self.queue: PriorityQueue[InFlightTask] = PriorityQueue()
        self.is_halted = False
        self._free_cores = FreeCores()
        self.expected_nodes = expected_nodes
        self._gate, self._finish, self._run_step = gate, finish, run_step
        self._on_room, self.patience_s = on_room, _PATIENCE_S
        self._blocked: InFlightTask | None = None
        """The first task of the queue, where there is no room for it since `_blocked_since`, by the loop's clock."""
        self._blocked_since = 0.0
        self._held: Mapping[Node, int] = {}
        """The nodes that are held for the first task of the queue, and how many of its ranks each can run."""
        self.on_free: Callable[[], object] = self.assign
        """Called when something has become free, or has to be placed anew."""
        self._lost: dict[str, tuple[Node, str]] = {}
        """The nodes that are gone for good, by name, with the reason."""
        self._away: dict[str, Node] = {}
        """The nodes that were lost and may be added again."""

    def add_node(self, node: Node) -> None:
        self.nodes.append(node)
        self._free_cores.add(node)
        self._lost.pop(node.name, None)
        self._away.pop(node.name, None)

    def expect_nodes(self, count: int) -> None:
        """Count on so many nodes from now on."""
        self.expected_nodes = count
        self.assign()

    def update(self, node: Node) -> None:
        """The free cores of the node have changed."""
        self._free_cores.update(node)

    @property
    def is_waiting(self) -> bool:
        """Whether there is something for `assign` to do: a task that waits, or a hold for one that waits no longer."""
        return self.queue.size > 0 or self._blocked is not None

    def assign(self) -> None:
        """Start queued tasks while there is room for them."""
        queue = self.queue
        while queue.size and self.nodes and not self.is_halted and self._assign_task(queue.first(), self.nodes):
            pass
        if self._blocked is not None and (not queue.size or queue.first() is not self._blocked):
            self._stop_holding()
        if queue.size and self.nodes and not self.is_halted:
            self._wait_for_room(queue.first())
            self._fill_holes()

    def _wait_for_room(self, first: InFlightTask) -> None:
        """Hold nodes for the first task once it has waited for long."""
        now = asyncio.get_running_loop().time()
        if self._blocked is None:
            self._blocked, self._blocked_since = first, now
        if now - self._blocked_since >= self.patience_s or first.priority > 0:
            layout = first.task_run.spec.layout
            self._held = self._held or nodes_to_hold(layout, self.nodes)
            self._hold(Hold.ALL if has_devices(layout.needs, self._held) else Hold.DEVICES)

    def _hold(self, hold: Hold) -> None:
        for node in self._held:
            before, node.hold = node.hold, hold
            if before is Hold.ALL is not hold:
                self._on_room(node)

    def _stop_holding(self) -> None:
        self._blocked = None
        self._hold(Hold.NOTHING)
        self._held = {}

    def _fill_holes(self) -> None:
        """Start tasks behind the first one for which there is room."""
        nodes = [node for node in self.nodes if node.hold is not Hold.ALL and node.pool.has_room]
        if not nodes:
            return
        without_room = [_shape_of(self.queue.first())]
        for task in list(islice(self.queue, 1, _LOOKAHEAD)):
            shape = _shape_of(task)
            if shape not in without_room and not self._fill_hole(task, nodes):
                without_room.append(shape)

    def _fill_hole(self, task: InFlightTask, nodes: Sequence[Node]) -> bool:
        needs = task.task_run.spec.layout.needs
        return self._assign_task(task, [node for node in nodes if node.admits(needs)])

    def _assign_task(self, task: InFlightTask, nodes: Sequence[Node]) -> bool:
        """Start or refuse a task of the queue. False where the task has to wait."""
        layout = task.task_run.spec.layout
        is_complete = not self._away and len(self.nodes) + len(self._lost) >= self.expected_nodes
        try:
            ranks = self._place(layout, nodes)
        except InvalidTask as error:
            if not is_complete or len(nodes) < len(self.nodes):
                return False
            self.queue.remove(task)
            self._finish(task, self._unplaceable(task, str(error)))
            return True
        if ranks is None or (not is_complete and layout.ranks > sum(node.cores for node in self.nodes)):
            return False
        self.queue.remove(task)
        placement = task.placement = Placement(ranks)
        for node in ranks:
            placement.devices[node] = node.take(task, len(ranks[node]))
            self._free_cores.update(node)
        self._gate.let_through([task], self.queue, partial(self._start, task, placement))
        return True

    def _unplaceable(self, task: InFlightTask, error: str) -> Outcome:
        """The outcome of a task that never fits on these nodes: lost where it would with the nodes that were lost."""
        all_nodes = [*self.nodes, *(node for node, _ in self._lost.values())]
        try:
            place(task.task_run.spec.layout, all_nodes, mpi_over_nodes=self._run_step is not None)
        except InvalidTask:
            return refused(error)
        return lost(task, f"{error} It had more: {'; '.join(reason for _, reason in self._lost.values())}")

    def _place(self, layout: Layout, nodes: Sequence[Node]) -> Mapping[Node, tuple[int, ...]] | None:
        """As `place`, which looks at all nodes; a task that asks for nothing and fits on the node with the most free
        cores needs no look."""
        ranks, is_plain = layout.ranks, layout.needs == _NO_NEEDS and nodes is self.nodes
        is_anywhere = is_plain and not any(group.template.host_name for group in layout.groups)
        if is_anywhere and ranks <= (layout.ranks_per_node or ranks):
            node = self._free_cores.roomiest()
            if node is not None and ranks <= node.pool.room(_NO_NEEDS):
                return {node: tuple(range(ranks))}
            if ranks == 1:
                return None
        return place(layout, nodes, mpi_over_nodes=self._run_step is not None, of_nodes=len(self.nodes))

    def _start(self, task: InFlightTask, placement: Placement) -> None:
        if self.is_halted or task.placement is not placement or any(node.agent is None for node in placement.ranks):
            return
        task.is_sent = True
        task.nodes = tuple(node.name for node in placement.ranks)
        for node, ranks in placement.ranks.items():
            own_ranks = ranks if len(placement.ranks) > 1 else ()
            devices = placement.devices[node]
            node.send(StartTask(task.task_run, own_ranks, task.nodes, self._is_in_step(task), devices))

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
            self._release_on(node, task)

    def _release_on(self, node: Node, task: InFlightTask) -> None:
        node.give_back(task)
        self._free_cores.update(node)
        self._on_room(node)

    def stop(self, task: InFlightTask) -> None:
        """Ask the nodes of a task to end it, or finish one that is held back from its start."""
        if task.placement is None:
            return
        if not task.is_sent:
            self._release(task, task.placement)
            self._finish(task, stopped(task))
            return
        for node in task.placement.running:
            node.send(CancelTask(task.uid))

    def take_held_back(self) -> list[InFlightTask]:
        """Take away the tasks that have their nodes and are held back from their start."""
        placed = {task.uid: task for node in self.nodes for task in node.process_tasks.values()}
        held_back = [task for task in placed.values() if not task.is_sent]
        for task in held_back:
            assert task.placement is not None
            self._release(task, task.placement)
        return held_back

    def ended_on(self, node: Node, task: InFlightTask, outcome: Outcome) -> None:
        """The ranks of the task on this node have ended."""
        placement = task.placement
        if placement is None or node not in placement.running:
            return
        placement.outcomes[node] = outcome
        self._release_on(node, task)
        if placement.running:
            self._end_others(task, placement, node)
        else:
            failed_first = placement.failed_first.name if placement.failed_first else None
            self._finish(task, merged([_part(placement, node) for node in placement.ranks], failed_first))
        self.on_free()

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
        self._free_cores.remove(node)
        if node in self._held:
            self._stop_holding()
        self._away[node.name] = node
        tasks = list(node.process_tasks.values())
        for task in reversed([task for task in tasks if not task.is_sent]):
            self._requeue(task)
        for task in [task for task in tasks if task.is_sent]:
            self.ended_on(node, task, stopped(task) if task.stop_cause else lost(task, reason))
        self.on_free()

    def give_up_node(self, name: str, reason: str) -> None:
        """A node that was lost does not come back. Does nothing for a node that never was there."""
        if (node := self._away.pop(name, None)) is not None:
            self._lost[name] = node, reason
            self.on_free()

    def _requeue(self, task: InFlightTask) -> None:
        assert task.placement is not None
        self._release(task, task.placement)
        task.take_back()
        if task.stop_cause is not None:
            self._finish(task, stopped(task))
        else:
            self.queue.appendleft(task)


_NO_NEEDS = Needs()


def _shape_of(task: InFlightTask) -> tuple[object, ...]:
    """What decides where the task can run: of tasks with one shape, there is room for all or for none."""
    if task.shape is None:
        layout = task.task_run.spec.layout
        hosts = tuple(group.template.host_name for group in layout.groups)
        task.shape = layout.ranks, layout.needs, layout.ranks_per_node, layout.pmi, hosts
    return task.shape


def _part(placement: Placement, node: Node) -> JobPart:
    return JobPart(node.name, placement.ranks[node], placement.outcomes[node])
