"""Starts the keeper process of an engine, waits for its end, and records both in the engine book."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rhapsody_mcp.backends.base import EngineBook
from rhapsody_mcp.engine.process.cleanup import end_remains, was_killed
from rhapsody_mcp.engine.process.tree import started_at

__all__ = ["KeeperHandle", "last_lines"]


def last_lines(log: Path, count: int) -> str:
    """The last lines of a log, joined to one; empty where there is no log."""
    try:
        return " | ".join(log.read_text(errors="replace").strip().splitlines()[-count:])
    except OSError:
        return ""


class KeeperHandle:
    """The keeper process of one engine, from `start` until `wait` returns.

    The processes of the engine carry `mark`, and the files of the engine are in `folder`.
    """

    def __init__(self, mark: str, kind: str, folder: Path, book: EngineBook | None) -> None:
        self._mark, self._kind, self._folder, self._book = mark, kind, folder, book
        self._process: asyncio.subprocess.Process | None = None
        self._exit_code: asyncio.Task[int] | None = None

    async def start(self, options: Sequence[str], command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a keeper, which starts `command`. Where this raises, no process and no file is left."""
        try:
            if self._book is not None:
                await self._book.opened(self._mark, self._kind, str(self._folder))
            process = self._process = await self._spawn(options, command, environment)
        except BaseException:
            await self._clean_up()
            raise
        if self._book is not None:
            self._book.launched(self._mark, process.pid, started_at(process.pid))
        self._exit_code = asyncio.create_task(self._watch(process))

    async def _spawn(
        self, options: Sequence[str], command: Sequence[str], environment: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "rhapsody_mcp.engine.keeper", "--mark", self._mark, *options, "--", *command],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code of the keeper once no process of the engine is left.

        Where the keeper was killed, this ends the processes that the keeper left.
        """
        assert self._exit_code is not None, "it was started"
        return await asyncio.shield(self._exit_code)

    def stop_engine(self) -> None:
        """Ask the keeper to stop the engine and then to exit."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """Kill the keeper; `wait` then ends the processes of the engine."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        code = await process.wait()
        await self._clean_up()
        return code

    async def _clean_up(self) -> None:
        if was_killed(self._folder, self._mark):
            await asyncio.to_thread(end_remains, self._folder, [self._mark])
        if self._book is not None:
            self._book.closed(self._mark)
