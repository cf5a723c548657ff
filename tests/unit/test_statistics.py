"""What statistics say of a set of tasks: times that add up, percentiles, rates, groups and the critical path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.model.outcome import Outcome, Usage
from rhapsody_mcp.model.percentiles import Distribution, spread_of
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.statistics import Places, Statistics, Tally
from rhapsody_mcp.model.task_totals import Row
from rhapsody_mcp.model.timing import Timing
from rhapsody_mcp.runtime.tasks import ComputeTask

INSTANTS = st.floats(-1e10, 1e10)


def row(
    name: str, submitted: float = 0.0, started: float | None = None, ended: float | None = None, **more: Any
) -> Row:
    fields = {"kind": "function", "state": TaskState.DONE, **more}
    return Row(uid=name, name=name, timing=Timing.of(submitted, started, ended), **fields)


def summed(
    rows: Iterable[Row], group: str | None = None, sources: Mapping[str, Sequence[str]] | None = None
) -> Statistics:
    """As a session does: what has ended is added up in parts, and the rest is there when it is asked."""
    waited_for, known = sources or {}, {each.uid: each for each in rows}
    tally, ended = Tally(), [each for each in known.values() if each.timing.ended is not None]
    for start in range(0, len(ended), 2):
        tally.add(ended[start : start + 2])
    going = [each for each in known.values() if each.timing.ended is None]
    return tally.statistics(going, known.get, lambda uid: waited_for.get(uid, ()), {"dragon": Places(2, 2)}, group)


# --- the times of one task


@given(INSTANTS, st.none() | INSTANTS, INSTANTS)
def test_total_is_queue_plus_execution_whatever_the_clocks_say(
    submitted: float, started: float | None, ended: float
) -> None:
    timing = Timing.of(submitted, started, ended)
    assert timing.queue_s is not None and timing.execution_s is not None
    assert timing.queue_s >= 0 and timing.execution_s >= 0
    assert timing.total_s == timing.queue_s + timing.execution_s
    assert timing.total_s == pytest.approx(max(ended, submitted) - submitted, rel=1e-9, abs=1e-4)


@given(INSTANTS, st.floats(0, 1e6), st.floats(0, 1e6))
def test_clocks_that_agree_are_taken_as_they_are(submitted: float, queue: float, execution: float) -> None:
    started = submitted + queue
    timing = Timing.of(submitted, started, started + execution)
    assert (timing.queue_s, timing.execution_s) == (started - submitted, started + execution - started)


def test_a_task_that_never_started_spent_all_its_time_in_the_queue() -> None:
    timing = Timing.of(10.0, None, 14.0)
    assert (timing.queue_s, timing.execution_s, timing.total_s) == (4.0, 0.0, 4.0)


@given(INSTANTS, st.lists(st.none() | INSTANTS, min_size=1), INSTANTS)
def test_the_times_of_a_retried_task_are_those_of_its_last_start(
    submitted: float, starts: list[float | None], ended: float
) -> None:
    task = ComputeTask(executable="true", retries=len(starts))
    task.submitted = submitted
    for started in starts:
        task.started, task.attempts = started, task.attempts + 1
        task.outcome = Outcome(state=TaskState.FAILED, started=started, ended=ended)
    assert task.timing == Timing.of(submitted, starts[-1], ended)
    assert task.timing.total_s == (task.timing.queue_s or 0) + (task.timing.execution_s or 0)


def test_a_task_that_has_not_ended_has_no_times() -> None:
    task = ComputeTask(executable="true")
    task.submitted = task.started = 1.0
    assert (task.timing.queue_s, task.timing.execution_s, task.timing.total_s) == (None, None, None)


# --- the times of many


@given(st.lists(st.tuples(INSTANTS, st.none() | INSTANTS, st.none() | INSTANTS)))
def test_average_total_is_average_queue_plus_average_execution(
    clocks: list[tuple[float, float | None, float | None]],
) -> None:
    statistics = summed(row(f"t{number}", *instants) for number, instants in enumerate(clocks))
    summary, times = statistics["summary"], statistics["times"]
    assert summary["total_tasks"] == len(clocks)
    assert summary["avg_total"] == summary["avg_queue"] + summary["avg_execution"]
    assert [summary["avg_total"], summary["avg_queue"], summary["avg_execution"]] == [
        times[name]["mean"] for name in ("total", "queue", "execution")
    ]


def test_percentiles_are_by_nearest_rank() -> None:
    spread = summed(row(f"t{n}", 0.0, 0.0, float(n)) for n in range(200, 0, -1))["times"]["execution"]
    assert spread == {"mean": 100.5, "p50": 100.0, "p95": 190.0, "p99": 198.0, "max": 200.0}


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(seconds: list[int]) -> None:
    spread = summed(row(f"t{n}", 0.0, 0.0, float(each)) for n, each in enumerate(seconds))["times"]["execution"]

    def share(bound: float) -> float:
        return 100 * sum(each <= bound for each in seconds) / len(seconds)

    for percent, value in ((50, spread["p50"]), (95, spread["p95"]), (99, spread["p99"])):
        assert value in seconds and share(value) >= percent > share(value - 1)


def test_times_are_those_of_tasks_that_started_and_have_ended_the_failed_ones_too() -> None:
    statistics = summed(
        [
            row("done", 0.0, 1.0, 3.0),
            row("failed", 0.0, 1.0, 7.0, state=TaskState.FAILED),
            row("canceled", 0.0, None, 900.0, state=TaskState.CANCELED),
            row("running", 0.0, 2.0, None, state=TaskState.RUNNING),
        ]
    )
    assert (statistics["ran"], statistics["makespan"], statistics["throughput"]) == (2, 7.0, 2 / 6)
    assert statistics["counts"] == {"DONE": 1, "FAILED": 1, "CANCELED": 1, "RUNNING": 1}
    assert statistics["summary"] == {"total_tasks": 4, "avg_total": 5.0, "avg_queue": 1.0, "avg_execution": 4.0}


def test_without_a_task_that_ran_there_are_zeros_and_no_rates() -> None:
    statistics = summed([row("canceled", 0.0, None, 5.0, state=TaskState.CANCELED)])
    assert statistics["summary"] == {"total_tasks": 1, "avg_total": 0.0, "avg_queue": 0.0, "avg_execution": 0.0}
    assert (statistics["ran"], statistics["makespan"], statistics["throughput"], statistics["tokens"]) == (
        *(0, 0.0, None, None),
    )
    assert (statistics["busy"], statistics["critical_path"]) == ([], {"seconds": 0.0, "steps": []})


def test_tokens_a_second_are_over_the_time_in_which_a_prompt_ran() -> None:
    prompt = {"kind": "prompt", "backend": "vllm"}
    tokens = summed(
        [
            row("a", 0.0, 0.0, 4.0, usage=Usage(100, 60), **prompt),
            row("b", 0.0, 1.0, 2.0, usage=Usage(100, 60), **prompt),
            row("c", 0.0, 10.0, 12.0, usage=Usage(40, 30), **prompt),
            row("uncounted", 0.0, 12.0, 14.0, **prompt),
            row("no prompt", 0.0, 0.0, 100.0),
        ]
    )["tokens"]
    assert tokens == {"prompt_tokens": 240, "completion_tokens": 150, "in_per_s": 30.0, "out_per_s": 18.75}


# --- workers


def test_workers_are_busy_with_native_functions_and_slots_with_processes() -> None:
    busy = summed(
        [
            row("a", 0.0, 0.0, 6.0, backend="dragon"),
            row("b", 0.0, 0.0, 3.0, backend="dragon"),
            row("single", 0.0, 20.0, 22.0, backend="dragon", kind="executable", cores=1),
            row("job", 0.0, 22.0, 24.0, backend="dragon", cores=64),
            row("elsewhere", 0.0, 0.0, 9.0, backend="unknown"),
            row("prompt", 0.0, 0.0, 9.0, backend="dragon", kind="prompt"),
        ]
    )["busy"]
    assert busy == [
        {"backend": "dragon", "of": "workers", "places": 2, "share": 0.75, "seconds": 9},
        {"backend": "dragon", "of": "cores", "places": 2, "share": 0.75, "seconds": 6},
    ]


# --- groups


def test_a_group_is_a_for_each_or_numbered_names_or_the_rest_by_kind() -> None:
    rows = [
        *(row(f"sweep[{n}]", 0.0, 0.0, 5.0, for_each="sweep") for n in range(3)),
        *(row(name, 0.0, 0.0, 2.0) for name in ("sim-1", "sim-2", "sim[30]")),
        *(row(name, 0.0, 0.0, 3.0) for name in ("train", "fold7", "2024")),
        row("ask", 0.0, 0.0, 1.0, kind="prompt"),
        Row(uid="task.000009", kind="prompt", state=TaskState.WAITING, timing=Timing()),
    ]
    groups = summed(rows)["groups"]
    assert [(name, sum(group["counts"].values()), group["ran"]) for name, group in groups.items()] == [
        ("sweep", 3, 3),
        ("function tasks", 3, 3),
        ("sim", 3, 3),
        ("prompt tasks", 2, 1),
    ]
    assert groups["sim"]["times"]["execution"]["p99"] == 2.0


def test_a_group_by_itself_has_the_numbers_that_it_has_among_the_others() -> None:
    rows = [row(f"{stem}-{n}", 0.0, 1.0 * n, 3.0 * n) for stem in ("a", "b") for n in (1, 2, 3)]
    alone = summed(rows, group="a")
    assert alone["groups"] == {"a": summed(rows)["groups"]["a"]}
    assert (alone["summary"]["total_tasks"], alone["ran"], alone["counts"]) == (3, 3, {"DONE": 3})
    with pytest.raises(UnknownName, match=r"unknown group 'aa'.*Valid: a, b"):
        summed(rows, group="aa")


# --- the critical path


def test_the_critical_path_goes_back_by_the_source_that_ended_last() -> None:
    path = summed(
        [
            row("quick", 0.0, 0.5, 1.0),
            row("slow", 0.0, 0.5, 4.0),
            row("join", 0.0, 4.25, 6.0),
            row("later", 7.0, 7.5, 9.0),
            row("beside", 0.0, 0.0, 8.0),
        ],
        sources={"join": ["quick", "slow"], "later": ["join"]},
    )["critical_path"]
    assert path["seconds"] == 9.0
    assert [tuple(step.values()) for step in path["steps"]] == [
        ("slow", 0.0, 0.5, 3.5),
        ("join", 0.0, 0.25, 1.75),
        ("later", 1.0, 0.5, 1.5),
    ]


def test_a_source_that_never_ran_is_on_the_path_with_its_queue_time() -> None:
    skipped = row("skipped", 0.0, None, 2.0, state=TaskState.CANCELED)
    path = summed([skipped, row("anyway", 0.0, 2.0, 3.0)], sources={"anyway": ["skipped"]})["critical_path"]
    assert [tuple(step.values()) for step in path["steps"]] == [("skipped", 0.0, 2.0, 0.0), ("anyway", 0.0, 0.0, 1.0)]


@given(st.lists(st.tuples(INSTANTS, INSTANTS, INSTANTS), min_size=1, max_size=8), st.data())
def test_the_steps_of_a_path_add_up_and_do_not_exceed_the_makespan(
    clocks: list[tuple[float, float, float]], data: st.DataObject
) -> None:
    rows = [row(f"t{number}", *instants) for number, instants in enumerate(clocks)]
    sources = {
        each.uid: data.draw(st.lists(st.sampled_from([before.uid for before in rows[:number]])))
        for number, each in enumerate(rows)
        if number
    }
    statistics = summed(rows, sources=sources)
    steps = statistics["critical_path"]["steps"]
    parts = [part for step in steps for part in (step["unsubmitted"], step["queue"], step["execution"])]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(statistics["critical_path"]["seconds"], rel=1e-9, abs=1e-4)
    assert statistics["critical_path"]["seconds"] <= statistics["makespan"] * (1 + 1e-9) + 1e-4


# --- numbers


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=40), max_size=12), st.integers(1, 3))
def test_percentiles_of_many_batches_are_those_of_all_their_numbers(batches: list[list[float]], parts: int) -> None:
    kept = [Distribution() for _ in range(parts)]
    for number, batch in enumerate(batches):
        kept[number % parts].add(batch)
    ordered = sorted(one for batch in batches for one in batch) or [0.0]
    told = spread_of(kept)
    for percent, value in ((50, told["p50"]), (95, told["p95"]), (99, told["p99"]), (100, told["max"])):
        assert value == ordered[math.ceil(percent * len(ordered) / 100) - 1]
    assert told["mean"] == pytest.approx(sum(ordered) / len(ordered), abs=1e-6)
    assert all(len(run) >= 2 * len(after) for one in kept for run, after in itertools.pairwise(one.runs))
