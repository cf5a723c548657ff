"""What a process sent before it died is received, whatever was being written to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.backends.compute.transport import Connection, UnixTransport
from rhapsody_mcp.engine.messages import TaskStarted, ToBackend
from rhapsody_mcp.engine.transport import frame

pytestmark = pytest.mark.anyio


class Receiver:
    """Stands for an engine."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.log: list[object] = []
        self.connected, self.over = asyncio.Event(), asyncio.Event()

    def received(self, connection: Connection, messages: Sequence[ToBackend]) -> None:
        self.connections.add(connection)
        self.log.extend(messages)
        self.connected.set()

    def disconnected(self, connection: Connection) -> None:
        self.log.append("gone")
        self.over.set()


async def test_last_messages_are_received_though_a_write_finds_the_other_end_gone(tmp_path: Path) -> None:
    engine, transport = Receiver(), UnixTransport(tmp_path)
    address = await transport.listen(engine)
    with socket.socket(socket.AF_UNIX) as process, anyio.fail_after(600):
        process.connect(address)
        process.sendall(frame([TaskStarted("hello", 1.0)]))
        await engine.connected.wait()
        (connection,) = engine.connections
        process.sendall(frame([TaskStarted("last words", 2.0)]))
        process.close()
        connection.send("more to do")
        await engine.over.wait()
    transport.close()
    assert engine.log == [TaskStarted("hello", 1.0), TaskStarted("last words", 2.0), "gone"]
