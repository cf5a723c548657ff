"""A node link as a real process on this machine: it starts a node agent, and ends everything when it has to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from rhapsody_mcp.backends.compute.nodes.keys import new_key
from rhapsody_mcp.backends.compute.nodes.transport import NodeLink, NodeTransport
from rhapsody_mcp.backends.compute.transport import Connection
from rhapsody_mcp.engine.messages import (
    FunctionFinished,
    HostConfig,
    NodeReady,
    RunFunction,
    StartWorker,
    ToBackend,
    WorkerReady,
)
from rhapsody_mcp.engine.network import tls
from rhapsody_mcp.engine.network.link_messages import LinkSettings, NodeHello, StartKeeper
from rhapsody_mcp.engine.node_link import NODE_LINK, SOCKET
from rhapsody_mcp.engine.process.tree import ENGINE, PROCESS_MARK, marked
from rhapsody_mcp.model.specs import Call
from rhapsody_mcp.model.values import load_json
from tests.processes import wait_until

pytestmark = pytest.mark.anyio


class Backend:
    """Stands for an engine, with one node link."""

    def __init__(self, results: Path) -> None:
        self.results, self.key = results, new_key()
        self.ends: list[NodeLink] = []
        """The links whose keeper has ended."""
        self.command: list[str] = []
        self.starts = 0
        self.transport = NodeTransport(tls.context(self.key, server=True), self.keeper_for, self.ends.append)
        self.connections: dict[type[object], Connection] = {}
        self.gone: list[Connection] = []
        self._queue: asyncio.Queue[ToBackend] = asyncio.Queue()
        self.mark = os.urandom(8).hex()
        self.hello: NodeHello | None = None

    def keeper_for(self, hello: NodeHello) -> StartKeeper:
        self.hello = hello
        self.starts += 1
        mark, name = f"{self.mark}.{self.starts}", f"agent{self.starts}"
        folder = f"{hello.folder}/{name}"
        host = HostConfig("local", mark, f"{hello.folder}/{SOCKET}", folder, sys.path, "/", link_folder=hello.folder)
        command = self.command or [sys.executable, "-m", "rhapsody_mcp.engine.host", f"{folder}/host.json"]
        files = {"host.json": msgspec.json.encode(host)}
        return StartKeeper(name, mark, ["--name", "t", "--stop", "close", "--", *command], files, {**os.environ})

    def received(self, connection: Connection, messages: Sequence[ToBackend]) -> None:
        for message in messages:
            self.connections[type(message)] = connection
            self._queue.put_nowait(message)

    def disconnected(self, connection: Connection) -> None:
        self.gone.append(connection)

    async def next(self, kind: type[object]) -> ToBackend:
        while type(message := await self._queue.get()) is not kind:
            pass
        return message

    async def run(self) -> object:
        """Run a function in a worker of the node; return the value."""
        self.connections[NodeReady].send(StartWorker("1"))
        await self.next(WorkerReady)
        call = Call("source", b"def f():\n    import os\n    return os.getpid()", "f")
        self.connections[WorkerReady].send(RunFunction("t", call, {}, str(self.results), 1))
        finished = await self.next(FunctionFinished)
        assert isinstance(finished, FunctionFinished) and finished.result.value is not None, finished
        return load_json(finished.result.value)

    @property
    def processes(self) -> list[int]:
        """The processes of the node, without the link."""
        return [*marked(ENGINE, self.mark), *marked(PROCESS_MARK, self.mark)]

    async def nothing_is_left(self) -> None:
        assert self.hello is not None
        folder = Path(self.hello.folder)
        await wait_until(lambda: not self.processes and not folder.exists(), 60)


@asynccontextmanager
async def linked(backend: Backend, lease_s: float = 60.0) -> AsyncIterator[asyncio.subprocess.Process]:
    port = int(await backend.transport.listen(backend))
    settings = LinkSettings(["127.0.0.1"], port, backend.key, lease_s)
    link = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "rhapsody_mcp.engine.node_link"],
        env={**os.environ, NODE_LINK: msgspec.json.encode(settings).decode()},
    )
    try:
        with anyio.fail_after(300):
            yield link
    finally:
        backend.transport.close()
        await link.wait()


async def test_a_node_runs_a_function_and_ends_on_request(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    async with linked(backend) as link:
        await backend.next(NodeReady)
        assert await backend.run() in backend.processes
        assert await backend.transport.end_nodes(60) == []
        assert await link.wait() == 0
        assert [end.host for end in backend.ends] == [backend.hello and backend.hello.host]
        await backend.nothing_is_left()


async def test_a_node_link_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    async with linked(backend) as link:
        await backend.next(NodeReady)
        await backend.run()
        link.send_signal(signal.SIGKILL)
        await backend.nothing_is_left()
        await wait_until(lambda: set(backend.gone) == set(backend.connections.values()), 60)


async def test_a_node_link_without_its_backend_ends_everything(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    async with linked(backend) as link:
        await backend.next(NodeReady)
        await backend.run()
        for known in list(backend.transport.links):
            known.multiplexer.abort()
        assert await link.wait() == 0
        await backend.nothing_is_left()


async def test_a_node_link_ends_everything_when_its_backend_is_silent(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    async with linked(backend, lease_s=10.0) as link:
        await backend.next(NodeReady)
        assert backend.processes
        assert await link.wait() == 0
        await backend.nothing_is_left()


async def test_a_node_agent_that_cannot_start_says_why(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    backend.command = ["sh", "-c", "echo no such thing >&2; exit 3"]
    async with linked(backend):
        await wait_until(lambda: bool(backend.ends), 60)
        (ended,) = backend.ends
        assert ended.keeper_ended is not None
        assert (ended.keeper_ended.exit_code, ended.keeper_ended.log) == (3, "no such thing\n")
        assert await backend.transport.end_nodes(60) == []
