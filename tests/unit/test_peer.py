"""What a process said before it died is heard, whatever was being written to it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from rhapsody_mcp.backends.compute.backend import _Peer
from rhapsody_mcp.engine.messages import Started
from rhapsody_mcp.engine.transport import frame

pytestmark = pytest.mark.anyio


class Listening:
    """Stands for an engine."""

    def __init__(self) -> None:
        self._peers: set[_Peer] = set()
        self.heard: list[object] = []
        self.connected, self.over = asyncio.Event(), asyncio.Event()

    def hear(self, peer: _Peer, message: object) -> None:
        self.connected.set()
        self.heard.append(message)

    def disconnected(self, peer: _Peer) -> None:
        self.heard.append("gone")
        self.over.set()


async def test_what_was_said_is_heard_though_a_write_finds_the_other_end_gone(tmp_path: Path) -> None:
    engine, path = Listening(), str(tmp_path / "socket")
    server = await asyncio.get_running_loop().create_unix_server(lambda: _Peer(cast(Any, engine)), path)
    async with server:
        with socket.socket(socket.AF_UNIX) as caller, anyio.fail_after(600):
            caller.connect(path)
            caller.sendall(frame([Started("hello", 1.0)]))
            await engine.connected.wait()
            (peer,) = engine._peers
            caller.sendall(frame([Started("last words", 2.0)]))
            caller.close()
            peer.send("more to do")
            await engine.over.wait()
    assert engine.heard == [Started("hello", 1.0), Started("last words", 2.0), "gone"]
