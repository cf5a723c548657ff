"""Decides on which nodes the ranks of a task run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import islice

from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.backends.compute.node_pool import needs_text
from rhapsody_mcp.engine.node.hardware import is_host
from rhapsody_mcp.model.errors import InvalidSettings, InvalidTask
from rhapsody_mcp.model.specs import Layout, Needs

__all__ = ["has_devices", "nodes_to_hold", "place", "refuse_too_large", "refuse_too_many_ranks", "slots_of_nodes"]

_NAMED = 10
_ANY = (None, "localhost")


def place(
    layout: Layout, nodes: Sequence[Node], *, mpi_over_nodes: bool = False, of_nodes: int | None = None
) -> dict[Node, tuple[int, ...]] | None:
    """The ranks of each node that the task gets now, the node of rank 0 first; None while the task has to wait.

    The nodes with the most room are filled, and the ranks are in the order of `nodes`. Ranks that speak MPI get one
    node. A job whose ranks ask for nothing, and which has more ranks than there are cores, waits until no core is used,
    and then gets ranks on each node in proportion to its cores. `of_nodes` is how many nodes there are, where `nodes`
    are some of them. Raises InvalidTask where the task can never run on these nodes.
    """
    of_nodes = len(nodes) if of_nodes is None else of_nodes
    most = layout.ranks_per_node or layout.ranks
    refuse_too_large(layout, nodes)
    pinned = _pinned_ranks(layout, nodes)
    refuse_too_many_ranks(layout, len(nodes))
    _refuse_too_many_pinned(pinned, most)
    _refuse_too_large_pinned(pinned, layout.needs)
    if layout.uses_mpi and of_nodes > 1 and not mpi_over_nodes:
        return _place_on_one_node(layout, nodes, pinned)
    pinned_counts = {node: len(ranks) for node, ranks in pinned.items()}
    counts = _rank_counts(layout, nodes, pinned_counts, most, are_all=len(nodes) == of_nodes)
    return None if counts is None else _in_rank_order(layout.ranks, counts, pinned)


def nodes_to_hold(layout: Layout, nodes: Sequence[Node]) -> dict[Node, int]:
    """The nodes that a task waits for, each with how many ranks it can run: those with the most room, as few as can
    run it."""
    needs, most = layout.needs, layout.ranks_per_node or layout.ranks
    pinned, missing = list(_pinned_ranks(layout, nodes)), layout.ranks
    chosen: dict[Node, int] = {}
    for node in [*pinned, *sorted(nodes, key=lambda node: node.pool.room(needs), reverse=True)]:
        if missing > 0 and node not in chosen:
            chosen[node] = min(node.pool.most(needs), most, missing)
            missing -= chosen[node]
    return chosen


def has_devices(needs: Needs, ranks: Mapping[Node, int]) -> bool:
    """Whether each of these nodes has the free GPUs and memory that so many ranks need."""
    return all(node.pool.has_devices(needs, count) for node, count in ranks.items())


def _pinned_ranks(layout: Layout, nodes: Sequence[Node]) -> dict[Node, list[int]]:
    """The ranks whose template names their node."""
    pinned: dict[Node, list[int]] = {}
    rank = 0
    for group in layout.groups:
        name = group.template.host_name
        if name not in _ANY:
            node = next((node for node in nodes if is_host(name, node.name)), None)
            if node is None:
                raise InvalidTask(f"host_name {name!r} is no node of this engine; it has {_names(nodes)}.")
            pinned.setdefault(node, []).extend(range(rank, rank + group.ranks))
        rank += group.ranks
    return pinned


def refuse_too_large(layout: Layout, nodes: Sequence[Node]) -> None:
    """Raise InvalidTask where the ranks ask for more than the nodes have."""
    needs = layout.needs
    if not needs or not nodes:
        return
    room = sum(min(node.pool.most(needs), layout.ranks_per_node or layout.ranks) for node in nodes)
    if layout.ranks > room:
        what = needs_text(needs) if layout.ranks == 1 else f"{layout.ranks} ranks of {needs_text(needs)} each"
        largest = max(nodes, key=lambda node: (node.pool.most(needs), node.cores))
        has = needs_text(Needs(largest.cores, largest.gpus, largest.memory_gb)) + (
            " and no GPU" if needs.gpus and not largest.gpus else ""
        )
        where = f"{len(nodes)} nodes, the largest with {has}" if len(nodes) > 1 else f"{largest.name} with {has}"
        valid = f"valid is up to {room} such ranks, or ranks that need less" if room else "ask for less"
        raise InvalidTask(f"it needs {what}, and this engine has {where}; {valid}.", field=_field_of(needs, largest))


def _field_of(needs: Needs, node: Node) -> str:
    """The field of the first need that the node cannot meet for one rank."""
    if needs.counted_cores > node.cores:
        return "cores"
    return "gpus" if needs.gpus > node.gpus else "memory_gb" if needs.memory_gb is not None else "cores"


def refuse_too_many_ranks(layout: Layout, nodes: int) -> None:
    """Raise InvalidTask where `ranks_per_node` allows too few ranks on this number of nodes."""
    most = layout.ranks_per_node
    if most is not None and layout.ranks > most * nodes:
        raise InvalidTask(
            f"{layout.ranks} ranks with ranks_per_node {most} need {-(-layout.ranks // most)} nodes, and this engine "
            f"has {nodes}; valid is up to {most * nodes} ranks, or a larger ranks_per_node.",
            field="ranks_per_node",
        )


def _refuse_too_many_pinned(pinned: Mapping[Node, Sequence[int]], most: int) -> None:
    for node, ranks in pinned.items():
        if len(ranks) > most:
            raise InvalidTask(
                f"host_name puts {len(ranks)} ranks on {node.name}, and ranks_per_node is {most}; "
                f"valid is up to {most}, or a larger ranks_per_node."
            )


def _refuse_too_large_pinned(pinned: Mapping[Node, Sequence[int]], needs: Needs) -> None:
    for node, ranks in pinned.items() if needs else ():
        if len(ranks) > (room := node.pool.most(needs)):
            has = needs_text(Needs(node.cores, node.gpus, node.memory_gb))
            raise InvalidTask(
                f"host_name puts {len(ranks)} ranks of {needs_text(needs)} each on {node.name} with {has}; "
                f"valid is up to {room} such ranks there."
            )


def _place_on_one_node(
    layout: Layout, nodes: Sequence[Node], pinned: Mapping[Node, Sequence[int]]
) -> dict[Node, tuple[int, ...]] | None:
    """Place a job that cannot run on several nodes."""
    if len(pinned) > 1:
        raise InvalidTask(
            f"ranks that speak MPI run on one node, and host_name names {len(pinned)} ({_names(list(pinned))}); "
            "valid is the same host_name for all ranks, or none."
        )
    most = layout.ranks_per_node or layout.ranks
    needs = layout.needs
    fitting = [node for node in pinned or nodes if layout.ranks <= min(node.pool.most(needs), most)]
    if not fitting:
        largest = max(min(node.pool.most(needs), most) for node in pinned or nodes)
        raise InvalidTask(
            f"{layout.ranks} ranks that speak MPI are too many for one node, and this engine does not run MPI over "
            f"several nodes; valid is up to {largest} ranks, or ranks without MPI (mpi: false)."
        )
    free = [node for node in fitting if node.agent is not None and node.pool.room(needs) >= layout.ranks]
    node = max(free, key=lambda node: node.pool.room(needs), default=None)
    return None if node is None else {node: tuple(range(layout.ranks))}


def _rank_counts(
    layout: Layout, nodes: Sequence[Node], pinned: Mapping[Node, int], most: int, *, are_all: bool
) -> dict[Node, int] | None:
    """The number of ranks of each node; None where there is too little room now."""
    ranks, needs = layout.ranks, layout.needs
    unpinned = ranks - sum(pinned.values())
    if unpinned > sum(_room(node.pool.most(needs), most, pinned.get(node, 0)) for node in nodes):
        if not are_all or not all(node.pool.is_idle for node in nodes):
            return None
        limits = [most - pinned.get(node, 0) for node in nodes]
        more = dict(zip(nodes, _in_proportion(unpinned, [node.cores for node in nodes], limits), strict=True))
    else:
        more = _fill(unpinned, nodes, needs, pinned, most)
    counts = {node: count for node in nodes if (count := pinned.get(node, 0) + more.get(node, 0))}
    is_free = all(
        node.agent and node.pool.room(needs) >= min(count, node.pool.most(needs)) for node, count in counts.items()
    )
    return counts if is_free and sum(counts.values()) == ranks else None


def _fill(ranks: int, nodes: Sequence[Node], needs: Needs, pinned: Mapping[Node, int], most: int) -> dict[Node, int]:
    """Spread ranks over the nodes, one after the other, the node with the most room first."""
    counts: dict[Node, int] = {}
    for node in sorted(nodes, key=lambda node: node.pool.room(needs), reverse=True):
        counts[node] = min(ranks, _room(node.pool.room(needs), most, pinned.get(node, 0)))
        ranks -= counts[node]
        if not ranks:
            break
    return counts


def _room(slots: int, most: int, pinned: int) -> int:
    return max(0, min(slots, most) - pinned)


def _in_rank_order(
    ranks: int, counts: Mapping[Node, int], pinned: Mapping[Node, Sequence[int]]
) -> dict[Node, tuple[int, ...]]:
    """The ranks of each node: pinned ranks where they belong, the others in order, node after node."""
    placed = {node: list(pinned.get(node, ())) for node in counts}
    pinned_ranks = {rank for numbers in pinned.values() for rank in numbers}
    unpinned = (rank for rank in range(ranks) if rank not in pinned_ranks)
    for node, count in counts.items():
        placed[node] += islice(unpinned, count - len(placed[node]))
    in_order = sorted(placed.items(), key=lambda item: min(item[1]))
    return {node: tuple(sorted(numbers)) for node, numbers in in_order}


def _in_proportion(count: int, sizes: Sequence[int], limits: Sequence[int], least: int = 0) -> list[int]:
    """Split `count` in proportion to `sizes`, into parts of at least `least` and at most their limit; the limits
    together allow `count`."""
    parts = [least] * len(sizes)
    loads = [((least + 1) / size, index) for index, size in enumerate(sizes) if limits[index] > least]
    heapify(loads)
    for _ in range(count - sum(parts)):
        _, index = loads[0]
        parts[index] += 1
        if parts[index] < limits[index]:
            heapreplace(loads, ((parts[index] + 1) / sizes[index], index))
        else:
            heappop(loads)
    return parts


def slots_of_nodes(num_workers: int | None, cores: Sequence[int]) -> list[int]:
    """The slots of each node, from the cores of each: `num_workers` in proportion to the cores, at least one a node;
    without `num_workers` one a core.

    Raises InvalidSettings for fewer workers than nodes.
    """
    if num_workers is None:
        return list(cores)
    if num_workers < len(cores):
        raise InvalidSettings(
            f"num_workers is {num_workers}, and the engine has {len(cores)} nodes; valid is at least one worker a node."
        )
    return _in_proportion(num_workers, cores, [num_workers] * len(cores), least=1)


def _names(nodes: Sequence[Node]) -> str:
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(repr(node.name) for node in nodes[:_NAMED]) + more
