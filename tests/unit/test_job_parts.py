"""The outcome of a job, made of the outcomes of its ranks on several nodes."""

from __future__ import annotations

import msgspec

from rhapsody_mcp.backends.compute.job_parts import JobPart, merged
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Measured, Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value


def value(text: str) -> Value:
    return Value("json", "str", len(text) + 2, f'"{text}"'.encode())


def done(node: str, *ranks: int, started: float = 1.0, ended: float = 2.0, notes: tuple[str, ...] = ()) -> JobPart:
    outcomes = tuple(RankOutcome(rank, node, exit_code=0, value=value(f"{node}{rank}")) for rank in ranks)
    return JobPart(
        node,
        ranks,
        Outcome(
            state=TaskState.DONE,
            started=started,
            ended=ended,
            value=value(f"{node}{ranks[0]}"),
            stdout=Stream(text=node),
            exit_code=0,
            ranks=outcomes,
            notes=notes,
        ),
    )


def failed(node: str, *ranks: int, bad: int, cause: Cause = Cause.EXIT_CODE) -> JobPart:
    """A part of which one rank has failed, with its own number as exit code."""
    outcomes = tuple(
        RankOutcome(rank, node, exit_code=rank, cause=cause, error="bad") if rank == bad else RankOutcome(rank, node)
        for rank in ranks
    )
    outcome = Outcome(
        state=TaskState.FAILED,
        started=1.0,
        ended=2.0,
        exit_code=bad,
        cause=cause,
        error=f"rank {bad} failed",
        ranks=outcomes,
    )
    return JobPart(node, ranks, outcome)


def not_run(node: str, *ranks: int, state: TaskState, cause: Cause, error: str) -> JobPart:
    return JobPart(node, ranks, Outcome(state=state, ended=3.0, cause=cause, error=error))


def test_a_task_on_one_node_keeps_its_outcome() -> None:
    part = done("a", 0, 1)
    assert merged([part]) is part.outcome


def test_a_job_tells_what_all_of_its_nodes_used_and_the_progress_of_its_first_rank_that_told_any() -> None:
    parts = [done("a", 0, 1), failed("b", 2, bad=2)]
    measured, told = [Measured(2.0, 500), Measured(3.0, 700)], [Progress(1.0, 7), Progress(1.0, 5)]
    outcome = merged(
        [
            part._replace(outcome=msgspec.structs.replace(part.outcome, measured=own, progress=progress))
            for part, own, progress in zip(parts, measured, told, strict=True)
        ]
    )
    assert (outcome.measured, outcome.progress) == (Measured(5.0, 700), Progress(1.0, 7))


def test_a_job_has_the_value_and_output_of_rank_0_and_all_ranks_in_order() -> None:
    outcome = merged([done("b", 0, 3, started=5.0, ended=6.0), done("a", 1, 2, started=4.0, ended=9.0)])
    assert (outcome.state, outcome.exit_code, outcome.started, outcome.ended) == (TaskState.DONE, 0, 4.0, 9.0)
    assert outcome.value == value("b0") and outcome.stdout.text == "b"
    assert [(rank.rank, rank.host) for rank in outcome.ranks] == [(0, "b"), (1, "a"), (2, "a"), (3, "b")]


def test_the_first_failed_rank_decides() -> None:
    outcome = merged([failed("a", 0, 1, 5, bad=5), failed("b", 2, 3, bad=3), done("c", 4)])
    assert (outcome.state, outcome.error, outcome.exit_code) == (TaskState.FAILED, "rank 3 failed", 3)
    assert outcome.value is None and outcome.stdout.text == ""


def test_the_failure_that_ended_the_other_ranks_decides() -> None:
    parts = [failed("a", 0, 1, bad=0, cause=Cause.CANCELED), failed("b", 2, 3, bad=3)]
    assert merged(parts, failed_first="b").error == "rank 3 failed"


def test_a_canceled_part_cancels_the_job_and_a_time_limit_goes_before() -> None:
    canceled = not_run("b", 2, state=TaskState.CANCELED, cause=Cause.CANCELED, error="canceled on request")
    late = not_run("c", 3, state=TaskState.FAILED, cause=Cause.TIMEOUT, error="its time was up")
    assert merged([failed("a", 0, bad=0), canceled]).state is TaskState.CANCELED
    assert merged([done("a", 0), canceled, late]).cause is Cause.TIMEOUT


def test_ranks_that_were_not_started_read_why() -> None:
    gone = not_run("b", 1, 2, state=TaskState.FAILED, cause=Cause.LOST, error="b is gone")
    outcome = merged([done("a", 0), gone], failed_first="b")
    assert (outcome.cause, outcome.error) == (Cause.LOST, "b is gone")
    assert outcome.ranks[1:] == tuple(RankOutcome(rank, "b", cause=Cause.LOST, error="b is gone") for rank in (1, 2))


def test_notes_say_which_nodes_they_are_about() -> None:
    outcome = merged([done("a", 0, notes=("x", "y")), done("b", 1, notes=("x",))])
    assert outcome.notes == ("on each of its 2 nodes: x", "on a: y")
