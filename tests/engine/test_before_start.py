"""No task starts before whoever writes down what starts knows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.backends.compute import start_gate
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask

pytestmark = pytest.mark.anyio


class Clerk:
    """Writes down what starts while its desk is open."""

    def __init__(self) -> None:
        self.desk = asyncio.Event()
        self.asked = asyncio.Event()
        self.known: list[str] = []

    async def __call__(self, uids: Sequence[str]) -> bool:
        self.asked.set()
        await self.desk.wait()
        self.known += uids
        return True


def notes(folder: Path) -> dict[str, str]:
    """What tasks that ran have left."""
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def leave_note(path: str) -> str:
    with open(path, "a", encoding="utf-8") as note:
        note.write("x")
    return path


def forms(folder: Path) -> list[ComputeTask]:
    """A task of each form, which leaves a note when it runs."""
    layouts: list[dict[str, object]] = [{}, {"process_template": {}}, {"process_templates": [(2, {})]}]
    tasks = [
        ComputeTask(leave_note, args=(str(folder / f"note{number}"),), task_backend_specific_kwargs=layout)
        for number, layout in enumerate(layouts)
    ]
    return [*tasks, ComputeTask(executable="touch", arguments=[str(folder / "note3")])]


async def test_each_task_is_known_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_gate, "_VALID_S", 60.0)
    backend, clerk = LocalExecutionBackend(num_workers=2), Clerk()
    backend.before_start = clerk
    async with Session([backend]) as session:
        tasks = forms(tmp_path)
        await session.submit_tasks(tasks)
        with anyio.fail_after(600):
            await clerk.asked.wait()
            last = ComputeTask(executable="true")
            assert notes(tmp_path) == {}
            clerk.desk.set()
            await session.submit_tasks([last])
            await session.wait_tasks([*tasks, last])
    assert sorted(clerk.known) == sorted(task.uid for task in [*tasks, last])
    assert notes(tmp_path) == {"note0": "x", "note1": "x", "note2": "xx", "note3": ""}


async def test_a_task_canceled_before_it_is_known_never_starts(tmp_path: Path) -> None:
    backend, clerk = LocalExecutionBackend(num_workers=8), Clerk()
    backend.before_start = clerk
    async with Session([backend]) as session:
        tasks = forms(tmp_path)
        await session.submit_tasks(tasks)
        with anyio.fail_after(600):
            await clerk.asked.wait()
            async with anyio.create_task_group() as group:
                group.start_soon(session.cancel, tasks)
                clerk.desk.set()
            after = ComputeTask(leave_note, args=(str(tmp_path / "after"),))
            await session.submit_tasks([after])
            await session.wait_tasks([after])
    assert {task.state for task in tasks} == {TaskState.CANCELED}
    assert notes(tmp_path) == {"after": "x"}


async def test_what_one_worker_was_about_to_get_goes_to_another_when_it_dies(tmp_path: Path) -> None:
    backend, clerk = LocalExecutionBackend(num_workers=1), Clerk()
    clerk.desk.set()
    backend.before_start = clerk
    async with Session([backend]) as session:
        first = ComputeTask(leave_note, args=(str(tmp_path / "first"),))
        await session.submit_tasks([first])
        await session.wait_tasks([first])
        dying = ComputeTask(_leave)
        rest = [ComputeTask(leave_note, args=(str(tmp_path / f"note{number}"),)) for number in range(20)]
        await session.submit_tasks([dying, *rest])
        with anyio.fail_after(600):
            await session.wait_tasks([dying, *rest])
    assert dying.state is TaskState.FAILED
    assert {task.state for task in rest} == {TaskState.DONE}
    assert notes(tmp_path) == {"first": "x", **{f"note{number}": "x" for number in range(20)}}


async def test_what_waits_behind_a_task_that_is_canceled_before_it_is_known_runs(tmp_path: Path) -> None:
    backend, clerk = LocalExecutionBackend(num_workers=1), Clerk()
    backend.before_start = clerk
    async with Session([backend]) as session:
        first, second = (ComputeTask(leave_note, args=(str(tmp_path / name),)) for name in ("first", "second"))
        await session.submit_tasks([first, second])
        with anyio.fail_after(600):
            await clerk.asked.wait()
            await session.cancel(first)
            clerk.desk.set()
            await session.wait_tasks([second])
    assert (first.state, second.state) == (TaskState.CANCELED, TaskState.DONE)
    assert notes(tmp_path) == {"second": "x"}


async def test_what_starts_long_after_it_became_known_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_gate, "_VALID_S", 0.0)
    backend, clerk = LocalExecutionBackend(num_workers=1), Clerk()
    clerk.desk.set()
    backend.before_start = clerk
    async with Session([backend]) as session:
        first, second = (ComputeTask(leave_note, args=(str(tmp_path / name),)) for name in ("first", "second"))
        await session.submit_tasks([first, second])
        with anyio.fail_after(600):
            await session.wait_tasks([first, second])
    assert clerk.known == [first.uid, second.uid, second.uid]


def _leave() -> None:
    import os

    os._exit(3)
