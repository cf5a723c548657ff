"""What a task says that was canceled because of another."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


def fails(_: TaskSpec, __: list[Any]) -> Outcome:
    return Outcome(state=TaskState.FAILED, ended=1.0, cause=Cause.ERROR, error="ValueError: " + "x" * 1900)


async def test_the_root_of_a_long_chain_is_named_once() -> None:
    async with Session([ScriptedBackend(fails)]) as session:
        chain = [ComputeTask(abs, args=(1,), name="boom")]
        for _ in range(500):
            chain.append(ComputeTask(abs, args=(chain[-1],)))
        await session.submit_tasks(chain)
        await session.wait_tasks(chain, timeout=60)
    said = {task.outcome.error for task in chain[1:] if task.outcome}
    assert len(said) == 1
    assert said.pop().startswith("boom did not end DONE: ValueError: xxx")
    assert sum(len(task.outcome.error) for task in chain[1:] if task.outcome) < 500 * 400
