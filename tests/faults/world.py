"""A service of its own for one row of the matrix, with the line of a client to it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml

from tests.agents import Refused
from tests.faults.clock import Clock
from tests.faults.disks import CannotMake, Disk
from tests.faults.lines import Gone, Line
from tests.faults.processes import command_of, ended, everyone, may_be_of, part, shared_memory, started, told
from tests.processes import FAMILY, wait_until

__all__ = ["Client", "Ground", "World"]

Ground: TypeAlias = AbstractContextManager[None]

_TRIES = 20
_LEFT_S = 15.0


class World:
    """`prefix` goes before every command that is run in it, and `starter` starts the service where it is set; it may
    have a disk, a group of processes or a clock of its own. Leaving `async with` kills what is left."""

    disk: Disk
    group: Path
    clock: Clock

    def __init__(self, on: Callable[[World], Ground], settings: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rhf-", dir="/tmp"))  # short: there is a socket in it
        self.place = self.folder / "place"
        self.runs, self.gate = self.folder / "runs", self.folder / "gate"
        self.prefix: list[str] = []
        self.starter: list[str] = []
        self.client = Client(self)
        self._ground = on(self)
        self._settings = settings
        self._opened = -1
        self._met: dict[int, int] = {}

    @property
    def state(self) -> Path:
        """Where the service keeps its ledger and the results."""
        return self.place / "state"

    @property
    def socket(self) -> Path:
        return self.place / f"{socket.gethostname()}.sock"

    async def __aenter__(self) -> Self:
        os.environ[FAMILY] = uuid.uuid4().hex
        for folder in (self.place, self.runs, self.folder / "tmp"):
            folder.mkdir()
        self.place.chmod(0o700)
        os.mkfifo(self.gate)
        self._ground.__enter__()
        (self.folder / "settings.yaml").write_text(yaml.safe_dump(self._settings))
        self._shared_before = shared_memory()
        if self.starter:
            await self._start_service()
        return self

    async def _start_service(self) -> None:
        """Started by another program than the clients' bridges; these find it there."""
        command = [*self.starter, "service", "run", *self.with_settings, "--folder", str(self.place)]
        pipe = asyncio.subprocess.DEVNULL
        await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=self.env)
        await wait_until(self.socket.exists)

    async def __aexit__(self, *_: object) -> None:
        if self._opened >= 0:
            os.close(self._opened)
        self.meet()
        try:
            await self.kill(*self._alive())
            await self.client.drop()
            for file in self._files():
                with suppress(FileNotFoundError):  # of another program, which has just removed it
                    os.unlink(file)
        finally:
            self._ground.__exit__(None, None, None)
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- its parts

    async def kill(self, *pids: int, by: signal.Signals = signal.SIGKILL) -> None:
        """Send the signal, and return when they have ended."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, by)
        async with asyncio.timeout(30):
            for pid in pids:
                await ended(pid)

    def one(self, name: str) -> int:
        """The process that plays this part. Raises CannotMake where there is none, or more than one."""
        found = part(name)
        if len(found) != 1:
            raise CannotMake(f"there are {len(found)} processes that are the {name}: {told(found)}")
        return found[0]

    def pid_in(self, run: str) -> int:
        """Of the process that wrote last into this file of `runs`."""
        return int((self.runs / run).read_text().splitlines()[-1].split()[0])

    def runs_of(self, run: str) -> int:
        """How often it ran."""
        file = self.runs / run
        return len(file.read_text().splitlines()) if file.exists() else 0

    def told_by(self, run: str) -> str:
        """By which process each time, and when."""
        return ", ".join((self.runs / run).read_text().splitlines())

    def open_gate(self) -> None:
        """Let those that wait at it go on, and those that come later too."""
        if self._opened < 0:
            self._opened = os.open(self.gate, os.O_RDWR)

    # --- its command line

    def command(self, *arguments: str) -> list[str]:
        folder = ["--folder", str(self.place)]
        return [*self.prefix, sys.executable, "-m", "rhapsody_mcp", *arguments, *folder]

    @property
    def with_settings(self) -> list[str]:
        return ["--config", str(self.folder / "settings.yaml")]

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.folder / "tmp")}

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        """The exit code of a command, and what it said on stdout and stderr."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self.command(*arguments), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=self.env
        )
        async with asyncio.timeout(60):
            stdout, stderr = await process.communicate()
        assert process.returncode is not None
        return process.returncode, stdout.decode(), stderr.decode()

    # --- its clients

    async def connect(self) -> Line:
        """A new line; the service is started by it where there is none."""
        said = self.folder / f"said-{uuid.uuid4().hex[:6]}"
        return await Line.open(self.command("stdio", *self.with_settings), self.env, said)

    async def refusal(self) -> str:
        """What a new client is told, which cannot be served. Raises AssertionError where it is."""
        line = await self.connect()
        try:
            reply = await line.call("list_sessions")
        except (Gone, Refused) as error:
            return str(error)
        finally:
            await line.close()
        raise AssertionError(f"a client was served that could not be: {json.dumps(reply)}")

    # --- its end

    async def stop(self) -> None:
        """Stop the service; the client leaves first."""
        await self.client.leave()
        code, stdout, stderr = await self.run("service", "stop", "--force")
        assert code == 0, f"service stop ended with {code}: {stdout} {stderr}"

    async def left(self, within_s: float = _LEFT_S) -> list[str]:
        """Processes and shared memory that are still there, some time after the stop."""
        with suppress(TimeoutError):
            await wait_until(lambda: not self._alive() and not self._files(), within_s=within_s)
        return [*told(self._alive()), *sorted(self._files())]

    def meet(self) -> None:
        """Remember all the processes that there are now, to know them when nothing leads to them any more."""
        self._met |= {pid: started(pid) for pid in everyone()}

    def _alive(self) -> set[int]:
        return everyone() | {pid for pid, start in self._met.items() if command_of(pid) and started(pid) == start}

    def _files(self) -> set[str]:
        return {file for file in shared_memory() - self._shared_before if may_be_of(file, self._met)}


class Client:
    """Whose line is made when it is needed, and anew when it is gone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.line: Line | None = None

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Repeats a call whose reply was lost: for those that read, and submissions with a key."""
        lost = Gone()
        for _ in range(_TRIES):
            try:
                self.line = self.line or await self._world.connect()
                return await self.line.call(tool, **arguments)
            except Gone as error:
                lost = error
                await self.drop()
        raise lost

    async def leave(self) -> None:
        """As clients do that have done their work."""
        if self.line is not None:
            await self.line.close()
        self.line = None

    async def drop(self) -> None:
        """Without a word."""
        if self.line is not None:
            if self.line.bridge.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(self.line.bridge.pid, signal.SIGKILL)  # its own kill() could collect it before asyncio does
            await self.line.bridge.communicate()
        self.line = None
