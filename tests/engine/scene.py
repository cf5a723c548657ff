"""A task that runs in an engine, tasks that wait behind it, and the engine's processes, to be killed or stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from tests.processes import dragon_files, family, wait_until

__all__ = ["ON_ALL_CORES", "PROCESS", "Scene", "kill", "sleep_with_a_child", "write_line"]

PROCESS: dict[str, Any] = {"process_template": {}}
ON_ALL_CORES: dict[str, Any] = PROCESS | {"cores": len(os.sched_getaffinity(0))}


# --- the functions that tasks run; imports inside, because only the function travels


def sleep_with_a_child(path: str) -> None:
    import os
    import subprocess
    import time

    subprocess.Popen(["sleep", "300"])
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(3600)  # longer than any test waits


def write_line(path: str) -> None:
    with open(path, "a") as file:
        file.write("ran\n")


class Scene:
    """A task that runs, four that wait behind it, and the processes of the engine that has them."""

    def __init__(self, session: Session, folder: Path, kwargs: dict[str, Any]) -> None:
        self.session = session
        self.up = folder / "up"
        self.running = ComputeTask(sleep_with_a_child, args=(str(self.up),), task_backend_specific_kwargs=kwargs)
        self.lines = [folder / f"line {number}" for number in range(4)]
        self.waiting = [
            ComputeTask(write_line, args=(str(path),), task_backend_specific_kwargs=kwargs) for path in self.lines
        ]
        self.launcher: set[int] = set()

    async def begin(self) -> None:
        await self.session.submit_tasks([self.running, *self.waiting])
        await wait_until(self.up.exists)

    def find(self, victim: str) -> set[int]:
        keeper = set(family("rhapsody_mcp.engine.keeper"))
        self.launcher = set(family("bin/dragon -s")) - keeper
        host = set(family("rhapsody_mcp.engine.host")) - keeper - self.launcher
        worker = int(self.up.read_text())
        found = {"keeper": keeper, "launcher": self.launcher, "host": host, "worker": {worker}}
        found["supervisor"] = {parent_of(worker)}
        forked = set(family("rhapsody_mcp.engine.fork_server"))
        found["fork server"] = {pid for pid in forked if parent_of(pid) not in forked}
        assert len(found[victim]) == 1, f"one {victim} is running"
        return found[victim]

    async def end(self) -> None:
        """Everything has come to its end, and what waited has run once."""
        await self.session.wait_tasks([self.running, *self.waiting], timeout=600)
        assert [(task.state, task.attempts) for task in self.waiting] == [(TaskState.DONE, 1)] * 4
        assert [path.read_text() for path in self.lines] == ["ran\n"] * 4
        assert not family("sleep", "300")
        assert not [path for pid in self.launcher & gone(self.launcher) for path in dragon_files(pid)]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


def gone(pids: set[int]) -> set[int]:
    return {pid for pid in pids if not Path(f"/proc/{pid}").exists()}


def kill(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)
