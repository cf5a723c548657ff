"""The state of an allocation in words, and the time of nodes that a session has used."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rhapsody_mcp.backends.pilot.allocation_facts import allocation_text, clock, make_facts, span
from rhapsody_mcp.backends.pilot.messages import PilotReady
from rhapsody_mcp.backends.pilot.node_time import AllocationHistory, NodeTime, node_time
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus

REQUEST = AllocationRequest(nodes=2, minutes=10)


def test_a_job_that_runs_has_its_nodes_and_the_time_that_is_left() -> None:
    now = time.time()
    pilot = PilotReady("n1", "/tmp/x", True, now + 240, ("n1", "n2"))
    facts = make_facts(REQUEST, 3, [NodeTime("6", 2, 0, 100)], "7", None, pilot)
    assert (facts.state, facts.on, facts.ended, round(facts.since or 0)) == (
        "RUNNING",
        ("n1", "n2"),
        1,
        round(now - 360),
    )
    assert facts.node_s == pytest.approx(200 + 2 * 360, abs=2)
    assert allocation_text(facts) == "job 7 RUNNING on n1, n2 for 6 min, 4 min left"


def test_a_job_that_waits_has_its_reason_and_estimated_start() -> None:
    now = time.time()
    status = JobStatus(
        state=JobState.PENDING,
        scheduler_state="PENDING",
        reason="Resources",
        explanation="waits until enough nodes are free",
        submitted_at=now - 30,
        estimated_start=now + 7200,
    )
    facts = make_facts(REQUEST, 1, [], "7", status, None)
    assert facts.node_s == 0
    text = f"job 7 PENDING for 30 s, Resources: waits until enough nodes are free; estimated start {clock(now + 7200)}"
    assert allocation_text(facts) == text
    assert text.endswith(", in 2 h")


def test_without_a_job_the_text_says_what_will_be_asked_for() -> None:
    assert (
        allocation_text(make_facts(REQUEST, 1, [], "", None, None))
        == "no job until a task needs one: 2 nodes for 10 min"
    )
    after = make_facts(REQUEST, 2, [NodeTime("6", 2, 0, 9)], "", None, None)
    assert allocation_text(after).startswith("no job, after 1 that ended, until a task needs one")
    less = make_facts(AllocationRequest(nodes=1, minutes=30), 2, [], "", None, None, left_minutes=12)
    assert allocation_text(less) == "no job until a task needs one: 1 node for 12 min"
    none = make_facts(REQUEST, 1, [NodeTime("6", 2, 0, 9)], "", None, None, left_minutes=0)
    assert allocation_text(none) == "no job: the time is used up, with 1 that ended, and no further task runs"


def test_jobs_that_are_over_are_found_again_by_the_next_service(tmp_path: Path) -> None:
    ended = JobStatus(state=JobState.ENDED, nodes=("n1", "n2"), started_at=100, ends_at=160)
    history = AllocationHistory()
    history.add(tmp_path, node_time("6", REQUEST, ended, None))
    history.add(tmp_path, node_time("7", REQUEST, JobStatus(state=JobState.ENDED, ends_at=200), None))
    assert history.jobs(tmp_path) == AllocationHistory().jobs(tmp_path) == [NodeTime("6", 2, 100, 160)]
    assert history.jobs(tmp_path)[0].node_s == 120


def test_a_job_that_was_given_back_leaves_its_time_to_the_next_and_others_use_up_their_turn(tmp_path: Path) -> None:
    history = AllocationHistory()
    assert history.minutes_left(tmp_path, 2, 10, 2) == 10
    history.add(tmp_path, NodeTime("6", 2, 0, 900, counts=False))
    assert history.minutes_left(tmp_path, 2, 10, 2) == 5
    history.add(tmp_path, NodeTime("7", 2, 900, 960))
    assert (history.minutes_left(tmp_path, 2, 10, 2), history.minutes_left(tmp_path, 2, 10, 1)) == (4, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45, "45 s"),
        (99, "99 s"),
        (720, "12 min"),
        (11_100, "3 h 5 min"),
        (7200, "2 h"),
        (187_200, "2 d 4 h"),
        (-1, "0 s"),
    ],
)
def test_spans_are_rounded_as_people_say_them(seconds: float, text: str) -> None:
    assert span(seconds) == text
