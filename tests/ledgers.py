"""Rows for tests of the ledger, and file systems that are full, read-only or none of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rhapsody_mcp.ledger.records import PutTasks, SessionRow, TaskEnded, TaskRow
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Value

__all__ = ["MKFS", "done", "ended", "file_system", "session", "task", "tasks"]

MKFS = shutil.which("mkfs.ext4", path=os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/sbin"])) or "mkfs.ext4"
"""PATH may name no folder of programs for administrators."""


def session(id: str = "s", used: float = 1.0, folder: str = "/nowhere") -> SessionRow:
    return SessionRow(id=id, created=1.0, used=used, wanted=b"{}", client="me", folder=folder, closing=False)


def task(
    number: int = 0, session: str = "s", parent: str | None = None, retries: int = 0, recipe: bytes = b"r"
) -> TaskRow:
    return TaskRow(
        session=session,
        uid=f"task.{number:06d}",
        number=number,
        parent=parent,
        recipe=recipe,
        state=TaskState.WAITING,
        submitted=1.0,
        started=None,
        attempts=0,
        retries=retries,
        last_failure="",
        position=None,
        outcome=None,
        client="me",
    )


def tasks(count: int, session: str = "s") -> PutTasks:
    return PutTasks(tuple(task(number, session) for number in range(count)))


def done(data: bytes = b"1", file: str | None = None) -> Outcome:
    value = Value("json", "int", 1, None if file else data, file)
    return Outcome(state=TaskState.DONE, started=2.0, ended=3.0, value=value)


def ended(number: int, data: bytes = b"1", session: str = "s") -> TaskEnded:
    return TaskEnded(session, f"task.{number:06d}", number, done(data))


@contextmanager
def file_system(place: Path, *options: str, kind: str = "tmpfs", what: str = "none") -> Iterator[Path]:
    """A file system of its own at this place; a machine where none can be mounted fails the test."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, *options, what, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
