"""Streams and files over one encrypted connection, on the loopback interface."""

from __future__ import annotations

import asyncio
import os
import resource
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.backends.compute.nodes.keys import new_key
from rhapsody_mcp.engine.network import tls
from rhapsody_mcp.engine.network.dial import dial
from rhapsody_mcp.engine.network.files import FileServer, fetch_file
from rhapsody_mcp.engine.network.multiplexer import FILE, PROCESS, Multiplexer, Stream

pytestmark = pytest.mark.anyio
KEY = new_key()
BIG = 32 * 1024 * 1024


class Notes:
    """The user of one stream."""

    def __init__(self) -> None:
        self.data = b""
        self.ended = asyncio.Event()
        self.received = asyncio.Event()

    def stream_received(self, data: bytes) -> None:
        self.data += data
        self.received.set()

    def stream_ended(self) -> None:
        self.ended.set()


class Pair:
    """The two ends of a connection. Each end answers what the other end opens with the same data, and ends the stream
    with the other end; files of `shared` are sent, and deleted where `moves` is set."""

    def __init__(self, shared: Path, moves: bool = False) -> None:
        self.shared, self.moves = shared, moves
        self.opened: list[tuple[Stream, bytes]] = []
        self.served: list[Multiplexer] = []
        self.connected = asyncio.Event()

    def server(self) -> Multiplexer:
        made = Multiplexer(is_server=True, open_stream=self.open, on_first_data=self.connected.set)
        self.served.append(made)
        return made

    def open(self, stream: Stream, kind: bytes) -> None:
        self.opened.append((stream, kind))
        if kind == FILE:
            FileServer(stream, lambda path: os.path.dirname(path) == str(self.shared), moves=self.moves)
        else:
            stream.user = Echo(stream)


class Echo(Notes):
    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def stream_received(self, data: bytes) -> None:
        super().stream_received(data)
        self.stream.write(data)

    def stream_ended(self) -> None:
        super().stream_ended()


@asynccontextmanager
async def connected(shared: Path, moves: bool = False) -> AsyncIterator[tuple[Pair, Multiplexer]]:
    pair = Pair(shared, moves)
    async with listening(pair.server) as port:
        client = await dial(["127.0.0.1"], port, KEY, lambda: Multiplexer(is_server=False, open_stream=pair.open))
        assert client is not None
        with anyio.fail_after(60):
            yield pair, client
        client.abort()
        await client.lost.wait()
        for server in pair.served:
            server.abort()


@asynccontextmanager
async def listening(
    protocol: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    made = await asyncio.get_running_loop().create_server(
        protocol, "127.0.0.1", 0, ssl=context or tls.context(KEY, server=True)
    )
    yield int(made.sockets[0].getsockname()[1])
    made.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.iterdir()}


async def has(notes: Notes, data: bytes) -> None:
    while len(notes.data) < len(data):
        notes.received.clear()
        await notes.received.wait()
    assert notes.data == data


async def test_streams_of_both_ends_carry_their_own_data(tmp_path: Path) -> None:
    async with connected(tmp_path) as (pair, client):
        users = [Notes() for _ in range(100)]
        streams = [client.new_stream(user, PROCESS) for user in users[:50]]
        for number, stream in enumerate(streams):
            stream.write(b"client %d" % number)
        await pair.connected.wait()
        for number, user in enumerate(users[50:]):
            pair.served[0].new_stream(user, PROCESS).write(b"server %d" % number)
        for number, user in enumerate(users):
            await has(user, b"client %d" % number if number < 50 else b"server %d" % (number - 50))
        assert {kind for _, kind in pair.opened} == {PROCESS}


async def test_a_stream_ends_after_its_data_and_no_other_ends(tmp_path: Path) -> None:
    async with connected(tmp_path) as (pair, client):
        ending, staying = Notes(), Notes()
        stream, other = client.new_stream(ending, PROCESS), client.new_stream(staying, PROCESS)
        stream.write(b"last words")
        stream.end()
        stream.write(b"too late")
        other.write(b"still here")
        await has(staying, b"still here")
        echo = pair.opened[0][0].user
        assert isinstance(echo, Echo)
        await echo.ended.wait()
        assert echo.data == b"last words"
        assert not staying.ended.is_set()
        assert not ending.ended.is_set(), "an end is not told to who ended the stream"


async def test_a_lost_connection_ends_all_streams(tmp_path: Path) -> None:
    async with connected(tmp_path) as (pair, client):
        users = [Notes(), Notes()]
        for user in users:
            client.new_stream(user, PROCESS).write(b"x")
        await has(users[1], b"x")
        pair.served[0].abort()
        for user in users:
            await user.ended.wait()
        assert client.lost.is_set()
        client.new_stream(Notes(), PROCESS).write(b"to nobody")


async def test_the_sender_of_much_data_waits_for_the_receiver(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        notes = Notes()
        stream = client.new_stream(notes, PROCESS)
        data, waits = os.urandom(BIG), 0
        for start in range(0, BIG, 1 << 20):
            stream.write(data[start : start + (1 << 20)])
            await asyncio.sleep(0)
            waits += not client.has_room.is_set()
            await stream.drain()
        await has(notes, data)
        assert waits > 0


@pytest.mark.parametrize("size", [0, 1, BIG])
async def test_a_file_is_copied(tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    content = os.urandom(size)
    (source / "result.pkl").write_bytes(content)
    async with connected(source) as (_, client):
        copy = await fetch_file(client, str(source / "result.pkl"), str(target))
    assert contents(target) == {copy: content}
    assert copy.endswith(".pkl")
    assert (source / "result.pkl").exists()


async def test_a_moved_file_is_deleted_once_it_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "file").write_bytes(b"moved")
    async with connected(tmp_path, moves=True) as (_, client):
        copy = await fetch_file(client, str(tmp_path / "file"), str(target))
        await client.close_and_wait(10)
    assert contents(target) == {copy: b"moved"}
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("path", ["{seen}/missing", "/etc/hostname", "{seen}/../seen/x/y"])
async def test_a_missing_or_forbidden_file_is_an_error_and_leaves_nothing(tmp_path: Path, path: str) -> None:
    seen, target = tmp_path / "seen", tmp_path / "target"
    seen.mkdir()
    target.mkdir()
    async with connected(seen) as (_, client):
        with pytest.raises(OSError, match="could not be copied: the node that has the file cannot read it, or is gone"):
            await fetch_file(client, path.format(seen=seen), str(target))
    assert list(target.iterdir()) == []


async def test_a_file_that_finds_no_room_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_bytes(b"x" * 1_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with connected(source) as (_, client):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match="could not be copied: File too large"):
                await fetch_file(client, str(source / "file"), str(target))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(target.iterdir()) == []


async def test_a_connection_that_is_lost_in_the_middle_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_bytes(os.urandom(BIG))
    async with connected(source) as (pair, client):
        copying = asyncio.create_task(fetch_file(client, str(source / "file"), str(target)))
        await pair.connected.wait()
        pair.served[0].abort()
        with pytest.raises(OSError, match="or is gone"):
            await copying
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("dialer", ["wrong", "right"])
async def test_another_key_is_refused_by_both_ends(tmp_path: Path, dialer: str) -> None:
    other = new_key()
    pair = Pair(tmp_path)
    context = tls.context(other if dialer == "right" else KEY, server=True)
    async with listening(pair.server, context) as port:
        pem = KEY if dialer == "right" else other
        assert await dial(["127.0.0.1"], port, pem, lambda: Multiplexer(is_server=False, open_stream=pair.open)) is None
        assert not pair.connected.is_set()


async def test_an_address_that_answers_is_enough(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    async with listening(pair.server) as port:
        chosen = await dial(
            ["127.0.0.2", "127.0.0.1"], port, KEY, lambda: Multiplexer(is_server=False, open_stream=pair.open)
        )
        assert chosen is not None
        notes = Notes()
        chosen.new_stream(notes, PROCESS).write(b"chosen")
        with anyio.fail_after(60):
            await has(notes, b"chosen")
            chosen.abort()
            await chosen.lost.wait()
            await pair.served[0].lost.wait()
        assert await dial(["127.0.0.2"], port, KEY, lambda: Multiplexer(is_server=False, open_stream=pair.open)) is None


async def test_a_file_over_a_connection_that_is_lost_is_an_error_at_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        await client.close_and_wait(10)
        with pytest.raises(OSError, match="cannot read it, or is gone"), anyio.fail_after(10):
            await fetch_file(client, str(tmp_path / "file"), str(tmp_path))
