"""Measures the dispatcher with simulated workers: one process answers for all workers, in place of a node agent.

    python -m rhapsody_mcp.bench.crowd CONFIG

So one dispatcher can be measured with more workers than this machine has cores.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from rhapsody_mcp.api import Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.bench.compute import functions
from rhapsody_mcp.bench.measurement import Row
from rhapsody_mcp.engine.messages import (
    FunctionFinished,
    FunctionResult,
    HostConfig,
    NodeReady,
    Ping,
    Pong,
    RunFunction,
    StartWorker,
    TaskStarted,
    ToHost,
    ToWorker,
    WorkerListening,
    WorkerReady,
)
from rhapsody_mcp.engine.process.tree import open_lifeline
from rhapsody_mcp.engine.transport import Frames, frame
from rhapsody_mcp.model.values import Value

__all__ = ["crowd_row"]

_FUNCTIONS_PER_S = 10_000


class _CrowdBackend(LocalExecutionBackend):
    """A local backend with this number of simulated workers."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.num_workers = workers

    def _host_command(self, config: Path) -> list[str]:
        return [sys.executable, "-m", "rhapsody_mcp.bench.crowd", str(config)]


@asynccontextmanager
async def crowd_row(workers: int, count: int) -> AsyncIterator[list[Row]]:
    """The benchmark of the dispatcher: its share of a core, session included, at _FUNCTIONS_PER_S."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files[1], max(files[0], 4 * workers)), files[1]))
    async with Session([await _CrowdBackend(workers)]) as session:

        async def share() -> float:
            before = time.process_time()
            await functions(session, count)
            return (time.process_time() - before) / count * _FUNCTIONS_PER_S

        name = f"{workers:,} workers that are not there, at {_FUNCTIONS_PER_S:,} functions a second: the dispatcher"
        yield [Row(name, share, shown="share")]


# --- the other side


class _SimulatedWorker(asyncio.Protocol):
    def __init__(self, name: str) -> None:
        self._name = name
        self._frames: Frames[ToWorker] = Frames(ToWorker)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(frame([WorkerReady(self._name)]))

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if isinstance(message, RunFunction):
                now = time.time()
                result = FunctionResult(Value("json", "NoneType", 4, b"null"))
                self._transport.write(
                    frame([TaskStarted(message.uid, now), FunctionFinished(message.uid, now, now, result)])
                )


class _SimulatedNode(asyncio.Protocol):
    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._frames: Frames[ToHost] = Frames(ToHost)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(frame([NodeReady("nowhere", os.getpid(), 1, 0, None)]))

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if isinstance(message, Ping):
                self._transport.write(frame([Pong()]))
            elif isinstance(message, StartWorker):
                asyncio.get_running_loop().create_task(self._connect_worker(message.worker))

    async def _connect_worker(self, worker: str) -> None:
        control = await self._connect(asyncio.Protocol)
        control.write(frame([WorkerListening(worker)]))
        await self._connect(partial(_SimulatedWorker, worker))

    async def _connect(self, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        """Connect to the backend; where its queue of connections is full, wait in a thread."""
        connection = socket.socket(socket.AF_UNIX)
        await asyncio.to_thread(connection.connect, self._config.address)
        transport, _ = await asyncio.get_running_loop().create_unix_connection(protocol, sock=connection)
        return transport


async def _serve(config: HostConfig) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(partial(_SimulatedNode, config), config.address)
    await asyncio.to_thread(os.read, open_lifeline(), 1)


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=HostConfig)))


if __name__ == "__main__":
    main()
