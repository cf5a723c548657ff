"""Failed tasks that run again in place, in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, InvalidTask, Session, TaskFailed
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.states import TaskState

pytestmark = pytest.mark.anyio


def square_unless_marked(number: int, folder: str) -> int:
    if (Path(folder) / str(number)).exists():
        raise ValueError(f"{number} is marked")
    return number * number


async def test_a_sweep_is_whole_after_its_failed_items_ran_again(tmp_path: Path) -> None:
    mark = tmp_path / "2"
    mark.touch()
    async with Session([LocalExecutionBackend(num_workers=2)]) as session:
        sweep = ForEach(
            [1, 2, 3], lambda number, _: ComputeTask(square_unless_marked, args=(number, str(tmp_path))), name="sweep"
        )
        program = ComputeTask(executable="sh", arguments=["-c", f"test ! -e {mark}"])
        total = ComputeTask(sum, args=(sweep,))
        tasks = [sweep, program, total]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
        assert [task.state for task in tasks] == [TaskState.FAILED, TaskState.FAILED, TaskState.CANCELED]
        with pytest.raises(TaskFailed):
            await program
        mark.unlink()
        again = await session.retry([sweep, program])
        assert [task.name or task.uid for task in again] == ["sweep[1]", "sweep", program.uid, total.uid]
        await session.wait_tasks(tasks, timeout=60)
        assert (await total).return_value == 14 and sweep.return_value == [1, 4, 9]
        assert (await program).attempts == sweep.children[1].attempts == 2
        assert session.get_statistics()["counts"] == {"DONE": 5}
        with pytest.raises(InvalidTask, match="nothing is to run again"):
            await session.retry(tasks)
