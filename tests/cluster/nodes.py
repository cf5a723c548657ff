"""Programs on the nodes of an allocation, and what they leave there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.cluster.cluster import Cluster

__all__ = ["Allocated", "leftovers", "processes", "running_owner"]

ROOT = Path(__file__).parents[2]
QUIET = ("bash", "sleep", "slurmd", "munged", "slurmstepd", "ps", "slurm_script")


class Allocated:
    """A program that runs as the script of a job, on the first node; its events are lines of JSON on its stdout."""

    def __init__(self, cluster: Cluster, job_id: str, lines: BufferedByteReceiveStream, folder: Path) -> None:
        self.cluster, self.job_id, self.folder, self._lines = cluster, job_id, folder, lines

    async def next(self, expected: str, within_s: float = 240) -> dict[str, Any]:
        """Return the next event, which must be of this kind."""
        with anyio.fail_after(within_s):
            while True:
                line = (await self._lines.receive_until(b"\n", 10_000_000)).decode()
                if line.startswith('{"event"'):
                    break
                sys.stderr.write(line)  # pytest shows this where a test fails
        event: dict[str, Any] = json.loads(line)
        assert event["event"] == expected, line
        return event

    def release(self) -> None:
        """Let the tasks that wait go on."""
        (self.folder / "release").touch()

    def starts(self) -> dict[str, list[str]]:
        """The nodes on which each task has started, by the notes of the tasks."""
        return {file.name[5:]: file.read_text().split()[::2] for file in self.folder.glob("task-*")}


@asynccontextmanager
async def running_owner(
    cluster: Cluster, folder: Path, *arguments: str, nodes: int = 2, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Allocated]:
    """Start `python -m tests.cluster.owner ARGUMENTS` in a job of all nodes, with its files in `folder`; cancel the job
    at the end."""
    events, script = folder / "events", folder / "script"
    os.mkfifo(events)
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in (environment or {}).items())
    command = shlex.join([sys.executable, "-m", "tests.cluster.owner", *arguments])
    script.write_text(f"#!/bin/sh\ncd {ROOT}\n{exports}exec {command} >{shlex.quote(str(events))} 2>&1\n")
    options = ["--parsable", f"--nodes={nodes}", "--no-kill", "--no-requeue", "--time=30", f"--output={folder}/log"]
    job_id = cluster.run("sbatch", *options, "--exclusive", str(script)).strip()
    reader = await anyio.open_process(["cat", str(events)], stderr=None)
    try:
        assert reader.stdout is not None
        yield Allocated(cluster, job_id, BufferedByteReceiveStream(reader.stdout), folder)
    finally:
        cluster.run("scancel", job_id)
        with anyio.CancelScope(shield=True):
            await _ended(cluster, job_id)
        if reader.returncode is None:
            reader.terminate()
        await reader.wait()


async def _ended(cluster: Cluster, job_id: str) -> None:
    with anyio.move_on_after(60):
        while cluster.run("squeue", "-h", "-t", "R,CG", "-j", job_id):  # noqa: ASYNC110 - Slurm has no event
            await anyio.sleep(0.2)


def processes(cluster: Cluster, node: str, *words: str) -> list[int]:
    """The ids, as the node sees them, of its processes whose command line has all these words; "^" stands for the
    beginning."""
    listing = cluster.run(*cluster.on(node, "ps", "-eo", "pid=,args="))
    lines = [line.split(None, 1) for line in listing.splitlines()]
    return [int(pid) for pid, command in lines if all(word in f"^{command}" for word in words)]


def kill(cluster: Cluster, node: str, *words: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to the oldest process of the node whose command line has these words."""
    pid = min(processes(cluster, node, *words))
    cluster.run(*cluster.on(node, "kill", f"-{number:d}", str(pid)))


async def leftovers(cluster: Cluster, node: str) -> list[str]:
    """What a program has left on a node: processes, folders, files in /dev/shm. Looks again until there is nothing, for
    a minute."""
    deadline = anyio.current_time() + 60
    while (left := _leftovers(cluster, node)) and anyio.current_time() < deadline:  # noqa: ASYNC110
        await anyio.sleep(0.2)
    return left


def _leftovers(cluster: Cluster, node: str) -> list[str]:
    show = "ps -eo comm=,args=; ls -d /tmp/rhapsody-*/* /dev/shm/* 2>/dev/null || :"
    lines = cluster.run(*cluster.on(node, "sh", "-c", show)).splitlines()
    return [line for line in lines if line.split()[0] not in (*QUIET, "sh") and not line.startswith(("sh ", "ls "))]
