"""What a task is given of its earlier life."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rhapsody_mcp.api import ComputeTask
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.recovery.restore import _restore_state
from tests.ledgers import task

RAN = Outcome(state=TaskState.DONE, started=2.0, ended=3.0)
NEVER = Outcome(state=TaskState.FAILED, ended=3.0, cause=Cause.INVALID)


@pytest.mark.parametrize(
    ("written", "started", "outcome", "attempts"),
    [(1, 2.0, RAN, 1), (0, None, RAN, 1), (1, None, RAN, 2), (0, None, NEVER, 0), (1, None, None, 1)],
    ids=["its start was written", "with its end alone", "after a retry", "never", "queued again"],
)
def test_a_start_that_was_heard_of_with_its_end_counts(
    written: int, started: float | None, outcome: Outcome | None, attempts: int
) -> None:
    restored = ComputeTask(executable="true")
    _restore_state(restored, replace(task(1), attempts=written, started=started, outcome=outcome))
    assert restored.attempts == attempts
