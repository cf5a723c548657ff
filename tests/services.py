"""Services of tests: each has a folder of its own, and is stopped with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.abc import Process
from mcp import Client, StdioServerParameters
from mcp.types import Implementation

from rhapsody_mcp.serving.paths import ServicePaths

__all__ = ["CLIENT", "PROGRAM", "OwnService", "own_service"]

CLIENT = Implementation(name="tests", version="1")
"""A client with a name of its own, whose waits take the usual time."""
PROGRAM = [sys.executable, "-m", "rhapsody_mcp"]


class OwnService:
    """A service in `folder`, which is started by whoever needs it first. `environment` is added to its own, and
    `launcher` stands before each command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = ServicePaths(folder)
        self.environment: dict[str, str] = {}
        self.launcher: list[str] = []

    def command(self, *words: str | Path) -> list[str]:
        return [*self.launcher, *PROGRAM, *map(str, words), "--folder", str(self.folder)]

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def status(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(self.run("service", "status", "--json").stdout))

    @property
    def pid(self) -> int:
        return int(self.status()["pid"])

    @asynccontextmanager
    async def client(self, era: str = "auto", *options: str | Path) -> AsyncIterator[Client]:
        """An MCP client before it, as a chat starts it."""
        command = self.command("stdio", *options)
        server = StdioServerParameters(command=command[0], args=command[1:], env=self._environment())
        async with Client(server, mode=cast(Any, era), client_info=CLIENT) as client:
            yield client

    @asynccontextmanager
    async def bridge(self, *options: str | Path) -> AsyncIterator[Process]:
        """For `tests.bare_client.call`; its stderr can be read."""
        command = self.command("stdio", *options)
        async with await anyio.open_process(command, env=self._environment()) as bridge:
            yield bridge


@contextmanager
def own_service(parent: Path = Path("/tmp")) -> Iterator[OwnService]:
    """In a folder of a short path: that of a socket is bounded. Afterwards it is stopped, whatever runs in it."""
    folder = Path(tempfile.mkdtemp(prefix="rhapsody-service-", dir=parent))
    service = OwnService(folder)
    try:
        yield service
        stopped = service.run("service", "stop", "--force")
        assert stopped.returncode == 0, stopped.stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)
