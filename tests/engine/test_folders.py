"""Where tasks of a real engine start, and what they hear where that folder is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.states import Cause, TaskState

pytestmark = pytest.mark.anyio


def where() -> str:
    import os

    return os.getcwd()


def in_process(cwd: str | None = None) -> ComputeTask:
    template = {} if cwd is None else {"cwd": cwd}
    return ComputeTask(where, task_backend_specific_kwargs={"process_template": template})


def told(task: ComputeTask) -> str:
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.INVALID)
    return str(task.exception)


async def test_a_task_runs_in_the_folder_of_its_session_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    backend = LocalExecutionBackend(num_workers=1)
    backend.cwd = str(folder)
    async with Session([backend]) as session:

        async def run(*tasks: ComputeTask) -> list[ComputeTask]:
            await session.submit_tasks(tasks)
            return [task for task in await session.wait_tasks(tasks, timeout=600) if isinstance(task, ComputeTask)]

        here = await run(ComputeTask(where), in_process())
        assert [task.return_value for task in here] == [str(folder)] * 2
        (lacking,) = await run(in_process("runs"))
        assert f"cwd 'runs', which is {folder}/runs here, is not a folder" in told(lacking)
        folder.rmdir()
        *gone, elsewhere = await run(
            ComputeTask(where), in_process(), in_process("runs"), ComputeTask(executable="/bin/pwd"), in_process("/")
        )
        for task in gone:
            assert f"the folder {folder} of this session is gone. Make it again, or give the task a cwd" in told(task)
        assert elsewhere.return_value == "/"
        folder.mkdir()
        again = await run(ComputeTask(where), in_process())
        assert [task.return_value for task in again] == [str(folder)] * 2


async def test_a_setup_line_that_fails_makes_tasks_invalid_and_nobody_is_told_to_try_again() -> None:
    async with Session([LocalExecutionBackend(num_workers=1, environment={"setup": ["false"]})]) as session:
        task = ComputeTask(where)
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=600)
        text = told(task)
        assert "'false' ended with exit code 1" in text and "ry again" not in text and ".." not in text
