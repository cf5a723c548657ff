"""Connects a node with the backend of an engine on another node.

    python -m rhapsody_mcp.engine.node_link

The configuration is in the environment variable RHAPSODY_NODE_LINK. The node link dials the backend, starts keepers on
request, and carries what the processes of this node write into the Unix socket of its folder. When the connection is
lost, or the backend is silent for too long, the node link ends everything that it started.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec

from rhapsody_mcp.engine.network.dial import dial
from rhapsody_mcp.engine.network.files import FileServer, SharedCopies, fetch_file
from rhapsody_mcp.engine.network.link_messages import (
    EndNode,
    FromNode,
    KeeperEnded,
    LinkSettings,
    NodeHello,
    StartKeeper,
    ToNode,
)
from rhapsody_mcp.engine.network.multiplexer import PORT, PROCESS, Multiplexer, Stream
from rhapsody_mcp.engine.network.ports import connect_to_port
from rhapsody_mcp.engine.process.cleanup import end_remains, was_killed
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.engine.process.shared_memory import old_dragon_files, unlink_unused
from rhapsody_mcp.engine.task.node_files import FILES_SOCKET, RESULTS
from rhapsody_mcp.engine.transport import Frames, frame, unread_data

__all__ = ["NODE_LINK", "SOCKET", "main"]

NODE_LINK = "RHAPSODY_NODE_LINK"
SOCKET = "backend"
"""The name of the Unix socket in the folder of a node link."""
_DIAL_S = 60.0
"""How long a node link tries to reach the backend, in seconds."""
_REDIAL_S = 0.5
_LAST_WORDS_S = 2.0
_LOG_CHARS = 2000


def main() -> int:
    settings = msgspec.json.decode(os.environ.pop(NODE_LINK), type=LinkSettings)
    try:
        unlink_unused(old_dragon_files())
        folder = RunDir()
    except OSError as error:
        sys.stderr.write(f"{socket.gethostname()}: no folder for the engine's files: {error}\n")
        return 1
    try:
        return asyncio.run(_NodeLink(settings, folder.path).serve())
    finally:
        folder.remove()


class _NodeLink:
    """Serves one connection, from the dial until every keeper has ended."""

    def __init__(self, settings: LinkSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._frames: Frames[ToNode] = Frames(ToNode)
        self._keepers: dict[str, asyncio.subprocess.Process] = {}
        self._inputs = SharedCopies(self._fetch_input)
        self._connection: Multiplexer | None = None
        self._watches: set[asyncio.Task[None]] = set()
        self._processes: set[_LocalConnection] = set()
        self._ended = asyncio.Event()

    async def serve(self) -> int:
        """Return the exit code of this program."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._ended.set)
        self._connection = connection = await self._dial()
        if connection is None:
            return 1
        connection.control.user = self
        (self._folder / RESULTS).mkdir()
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_unix_server(
                lambda: _LocalConnection(connection, self._processes), str(self._folder / SOCKET)
            ),
            await asyncio.start_unix_server(self._copy_input, str(self._folder / FILES_SOCKET)),
        ]
        self._send(NodeHello(socket.gethostname(), os.getpid(), str(self._folder)))
        await self._until_ended(connection)
        await self._stop_keepers()
        for server in servers:
            server.close()
        await connection.close_and_wait(_LAST_WORDS_S)
        return 0

    # --- the connection

    async def _dial(self) -> Multiplexer | None:
        """Connect to the address that answers first; None where none answers in time."""
        settings = self._settings
        with suppress(TimeoutError):
            async with asyncio.timeout(_DIAL_S):
                while not self._ended.is_set():
                    if connection := await dial(settings.addresses, settings.port, settings.pem, self._multiplexer):
                        return connection
                    await asyncio.sleep(_REDIAL_S)
        sys.stderr.write(f"no answer from {settings.addresses} port {settings.port} in {_DIAL_S:g} s\n")
        return None

    def _multiplexer(self) -> Multiplexer:
        return Multiplexer(is_server=False, open_stream=self._open_stream)

    def _send(self, message: FromNode) -> None:
        assert self._connection is not None, "it was dialed"
        self._connection.control.write(frame([message]))

    async def _until_ended(self, connection: Multiplexer) -> None:
        """Wait until the backend ends this node, the connection is lost, or nothing was received for the lease."""
        loop, lease_s = asyncio.get_running_loop(), self._settings.lease_s
        while (left_s := connection.last_received + lease_s - loop.time()) > 0 and not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._ended.wait()

    # --- what the backend asks for

    def stream_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            match message:
                case StartKeeper():
                    watch = asyncio.create_task(self._run_keeper(message))
                    self._watches.add(watch)
                    watch.add_done_callback(self._watches.discard)
                case EndNode():
                    self._ended.set()

    def stream_ended(self) -> None:
        self._ended.set()

    async def _run_keeper(self, request: StartKeeper) -> None:
        try:
            (self._folder / request.name).mkdir()
            for name, content in request.files.items():
                (self._folder / request.name / name).write_bytes(content)
            code = await self._keep(request)
        except OSError as error:
            self._send(KeeperEnded(request.name, 1, f"{socket.gethostname()}: {error}"))
            return
        while self._processes:  # what they had sent goes first
            await asyncio.wait([connection.ended for connection in self._processes])
        log = self._log_of(request)
        text = log.read_text(errors="replace") if log.exists() else ""
        shutil.rmtree(self._folder / request.name, ignore_errors=True)
        self._send(KeeperEnded(request.name, code, text[-_LOG_CHARS:]))

    def _log_of(self, request: StartKeeper) -> Path:
        return self._folder / f"{request.name}.log"

    async def _keep(self, request: StartKeeper) -> int:
        """Run a keeper; return its exit code once no process of its command is left."""
        log = self._log_of(request)
        keeper = self._keepers[request.name] = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "rhapsody_mcp.engine.keeper", "--mark", request.mark, "--log", str(log)],
            *request.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=request.environment,
            start_new_session=True,
        )
        code = await keeper.wait()
        del self._keepers[request.name]
        if was_killed(self._folder, request.mark):
            await asyncio.to_thread(end_remains, self._folder, [request.mark])
        return code

    async def _stop_keepers(self) -> None:
        """Stop every keeper; the time that a keeper takes is bounded by its own grace period."""
        for keeper in self._keepers.values():
            if keeper.stdin is not None:
                keeper.stdin.close()
        if self._watches:
            await asyncio.wait(self._watches)

    # --- files

    def _open_stream(self, stream: Stream, kind: bytes) -> None:
        """Move a file of results to the backend, or connect the backend with a port of this node."""
        if kind == PORT:
            connect_to_port(stream)
            return
        FileServer(stream, lambda path: os.path.dirname(path) == str(self._folder / RESULTS), moves=True)

    async def _copy_input(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy the file that a process of this node asks for, once; answer with the path of the copy."""
        with suppress(OSError, asyncio.IncompleteReadError):
            path = os.fsdecode((await reader.readuntil(b"\0"))[:-1])
            writer.write(os.fsencode(await self._inputs.copy_of(path)))
        writer.close()

    async def _fetch_input(self, path: str) -> str:
        assert self._connection is not None, "it was dialed"
        return await fetch_file(self._connection, path, str(self._folder / RESULTS))


class _LocalConnection(asyncio.Protocol):
    """A process of this node, whose data is carried by a stream."""

    def __init__(self, connection: Multiplexer, known: set[_LocalConnection]) -> None:
        self._stream: Stream = connection.new_stream(self, PROCESS)
        self._known = known
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._known.add(self)
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._stream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._stream.write(unread_data(self._transport.get_extra_info("socket").fileno()))
        self._stream.end()
        self._known.discard(self)
        self.ended.set_result(None)

    def stream_received(self, data: bytes) -> None:
        self._transport.write(data)

    def stream_ended(self) -> None:
        self._transport.close()


if __name__ == "__main__":
    sys.exit(main())
