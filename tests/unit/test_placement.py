"""On which nodes the ranks of a task run, and how many slots each node has."""

from __future__ import annotations

from typing import Literal

import pytest

from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.backends.compute.placement import place, slots_of_nodes
from rhapsody_mcp.model.errors import InvalidSettings, InvalidTask
from rhapsody_mcp.model.specs import Layout, RankGroup, Template
from tests.unit.dispatching import Notes

Ranks = dict[str, tuple[int, ...]]


def nodes(**free: tuple[int, int]) -> list[Node]:
    """Nodes by name, each with its slots and how many of these are free."""
    made = []
    for name, (slots, free_slots) in free.items():
        node = Node(name, slots, agent=Notes())
        node.pool.used_cores = slots - free_slots
        made.append(node)
    return made


def placed(
    all_nodes: list[Node],
    *groups: tuple[int, str | None],
    most: int | None = None,
    pmi: Literal["auto", "none"] | None = None,
) -> Ranks | None:
    """The ranks of each node, for groups of a number of ranks and a host name."""
    made = tuple(RankGroup(ranks, Template(host_name=host)) for ranks, host in groups)
    ranks = place(Layout("job", made, pmi, ranks_per_node=most), all_nodes)
    return None if ranks is None else {node.name: numbers for node, numbers in ranks.items()}


def test_a_job_that_fits_on_a_node_runs_on_the_node_with_the_most_free_slots() -> None:
    assert placed(nodes(a=(4, 2), b=(4, 3), c=(4, 3)), (2, None)) == {"b": (0, 1)}


def test_a_larger_job_fills_node_after_node() -> None:
    assert placed(nodes(a=(4, 4), b=(4, 4), c=(4, 4)), (6, None)) == {"a": (0, 1, 2, 3), "b": (4, 5)}


def test_a_job_waits_until_all_its_slots_are_free() -> None:
    assert placed(nodes(a=(4, 1), b=(4, 2)), (4, None)) is None
    assert placed(nodes(a=(4, 1), b=(4, 3)), (4, None)) == {"a": (0,), "b": (1, 2, 3)}


def test_ranks_per_node_bounds_the_ranks_of_each_node() -> None:
    three = nodes(a=(4, 4), b=(4, 4), c=(4, 4))
    assert placed(three, (5, None), most=2) == {"a": (0, 1), "b": (2, 3), "c": (4,)}
    assert placed(nodes(a=(4, 4), b=(4, 0)), (2, None), most=1) is None
    with pytest.raises(InvalidTask, match=r"7 ranks with ranks_per_node 2 need 4 nodes.* has 3; valid is up to 6"):
        placed(three, (7, None), most=2)


def test_ranks_run_on_the_node_that_their_host_name_means() -> None:
    pair = nodes(**{"a.site": (4, 4), "b.site": (4, 4)})
    assert placed(pair, (1, "b"), (3, None), (1, "b.site")) == {"b.site": (0, 4), "a.site": (1, 2, 3)}
    assert placed(pair, (2, "localhost")) == {"a.site": (0, 1)}
    with pytest.raises(InvalidTask, match=r"host_name 'c' is no node of this engine; it has 'a.site', 'b.site'\."):
        placed(pair, (1, None), (1, "c"))
    with pytest.raises(InvalidTask, match=r"puts 3 ranks on a\.site, and ranks_per_node is 2"):
        placed(pair, (3, "a"), (1, None), most=2)


def test_more_ranks_than_slots_wait_for_all_nodes_and_share_them_in_proportion() -> None:
    assert placed(nodes(a=(2, 2), b=(4, 3)), (9, None)) is None
    assert placed(nodes(a=(2, 2), b=(4, 4)), (9, None)) == {"a": (0, 1, 2), "b": (3, 4, 5, 6, 7, 8)}
    assert placed(nodes(a=(2, 2), b=(4, 4)), (8, None), most=4) == {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7)}


def test_more_pinned_ranks_than_slots_take_that_node_alone() -> None:
    assert placed(nodes(a=(2, 1), b=(4, 4)), (5, "a")) is None
    assert placed(nodes(a=(2, 2), b=(4, 4)), (5, "a")) == {"a": (0, 1, 2, 3, 4)}


def test_ranks_that_speak_mpi_get_one_node() -> None:
    pair = nodes(a=(4, 4), b=(8, 3))
    assert placed(pair, (4, None), pmi="auto") == {"a": (0, 1, 2, 3)}
    assert placed(pair, (6, None), pmi="auto") is None
    assert placed(pair, (6, None), pmi="none") == {"a": (0, 1, 2, 3), "b": (4, 5)}
    assert placed(nodes(a=(2, 2)), (4, None), pmi="auto") == {"a": (0, 1, 2, 3)}, (
        "on an engine of one node they share it"
    )
    with pytest.raises(InvalidTask, match=r"9 ranks that speak MPI are too many for one node.*valid is up to 8 ranks"):
        placed(pair, (9, None), pmi="auto")
    with pytest.raises(InvalidTask, match="valid is the same host_name for all ranks"):
        placed(pair, (1, "a"), (1, "b"), pmi="auto")


@pytest.mark.parametrize(
    ("num_workers", "cores", "slots"),
    [
        (None, [2, 8], [2, 8]),
        (10, [2, 8], [2, 8]),
        (8, [4, 4], [4, 4]),
        (7, [4, 4], [4, 3]),
        (2, [1, 64], [1, 1]),
        (9, [1, 1, 7], [1, 1, 7]),
    ],
)
def test_workers_are_spread_in_proportion_to_the_cores(
    num_workers: int | None, cores: list[int], slots: list[int]
) -> None:
    assert slots_of_nodes(num_workers, cores) == slots


def test_each_node_needs_a_worker() -> None:
    with pytest.raises(InvalidSettings, match="num_workers is 1, and the engine has 2 nodes; valid is at least one"):
        slots_of_nodes(1, [4, 4])
