"""What one caller cannot take from the others."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from anyio.abc import Process
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from starlette.types import Message, Receive, Scope, Send

from rhapsody_mcp.serving.http.limits import BodyLimit, RateLimit, SendLimit, TokenBuckets
from rhapsody_mcp.serving.peer_credentials import Peer
from tests.agents import ERAS
from tests.bare_client import COMMAND
from tests.security.guarded import Guarded, call_body, guarded
from tests.services import own_service

pytestmark = pytest.mark.anyio

TIGHT = "http_slow_s: 1\nhttp_connections: 8\nrequest_bytes: 65536\n"
LONG = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("tight"), settings=TIGHT) as server:
        yield server


@contextmanager
def connection(server: Guarded) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as opened:
        yield opened


def said(opened: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    heard = b""
    try:
        while more := opened.recv(65536):
            heard += more
    except ConnectionResetError:
        pass
    return heard


def is_served(server: Guarded) -> bool:
    return server.post(call_body()).status_code == 200


# --- long requests


def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_read(server: Guarded) -> None:
    with connection(server) as opened:
        opened.sendall(b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n")
        answer = said(opened)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"longer than 65536 bytes (setting request_bytes)" in answer
    assert is_served(server)


def test_a_body_of_unsaid_length_is_refused_where_it_gets_too_long(server: Guarded) -> None:
    with connection(server) as opened:
        opened.sendall(b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):
            opened.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        assert said(opened).startswith(b"HTTP/1.1 413 ")
    assert is_served(server)


async def test_a_client_reads_that_its_call_is_too_long(server: Guarded) -> None:
    async with Client(streamable_http_client(server.address), mode="auto") as client:
        with pytest.raises(Exception, match="longer than 65536 bytes"):
            await client.call_tool("submit_tasks", {"session": "s", "tasks": [{"prompt": "x" * LONG}]})
        assert (await client.list_tools()).tools


@asynccontextmanager
async def in_process(folder: Path) -> AsyncIterator[Process]:
    file = folder / "settings.yaml"
    file.write_text(TIGHT)
    async with await anyio.open_process([*COMMAND, "--config", str(file)], stderr=None) as server:
        yield server


@asynccontextmanager
async def through_the_service(folder: Path) -> AsyncIterator[Process]:
    file = folder / "settings.yaml"
    file.write_text(TIGHT)
    with own_service() as service:
        async with service.bridge("--config", file) as bridge:
            yield bridge


@pytest.mark.parametrize("opened", [in_process, through_the_service])
async def test_a_line_that_is_too_long_is_answered_and_the_connection_goes_on(opened: Any, tmp_path: Path) -> None:
    with anyio.fail_after(600):
        async with opened(tmp_path) as process:
            long = call_body("tools/call", "submit_tasks", tasks=[{"prompt": "x" * LONG}]) | {"id": 41}
            for id, body in ((41, long), (42, call_body() | {"id": 42})):
                await process.stdin.send(json.dumps(body).encode() + b"\n")
                answer = json.loads(await line_of(process))
                assert answer["id"] == id
                assert ("result" in answer) == (id == 42)
                if id == 41:
                    assert "longer than 65536 bytes (setting request_bytes)" in answer["error"]["message"]


async def line_of(process: Process) -> bytes:
    assert process.stdout
    heard = b""
    while not heard.endswith(b"\n"):
        heard += await process.stdout.receive()
    return heard


# --- slow clients


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nX-", b"\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"],
)
def test_a_head_that_does_not_come_whole_ends_the_connection(begun: bytes, server: Guarded) -> None:
    with connection(server) as opened:
        opened.sendall(begun)
        said(opened)  # returns
    assert is_served(server)


def test_a_body_that_does_not_come_whole_is_answered_and_ends(server: Guarded) -> None:
    with connection(server) as opened:
        opened.sendall(b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        assert said(opened).startswith(b"HTTP/1.1 408 ")


def test_who_is_refused_cannot_go_on_sending_for_ever(server: Guarded) -> None:
    with connection(server) as opened:
        opened.sendall(b"POST /mcp HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 60000\r\n\r\n")
        with pytest.raises(OSError):
            while True:
                opened.sendall(b"x")


@pytest.mark.parametrize("era", ERAS)
async def test_a_wait_that_is_longer_than_a_request_may_take_is_not_cut(era: Any, server: Guarded) -> None:
    async with Client(streamable_http_client(server.address), mode=era) as client:
        opened = await client.call_tool("create_session", {"backends": ["local"]})
        session = cast(dict[str, Any], opened.structured_content)["session"]
        task = {"executable": "/bin/sleep", "arguments": ["3"]}
        await client.call_tool("submit_tasks", {"session": session, "tasks": [task]})
        waited = await client.call_tool("wait_tasks", {"session": session, "timeout_s": 30})
        assert waited.structured_content and waited.structured_content["counts"] == {"DONE": 1}
        await client.call_tool("close_session", {"session": session})


# --- many requests


def test_too_many_connections_are_cut_and_others_served_when_they_end(server: Guarded) -> None:
    opened = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(8)]
    with connection(server) as one_more:
        assert said(one_more) == b""
    for one in opened:
        one.close()
    with connection(server) as later:
        later.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert said(later).startswith(b"HTTP/1.1 ")


def test_who_sends_too_many_requests_is_told_when_to_go_on_and_others_are_served(tmp_path: Path) -> None:
    with guarded(tmp_path, settings="http_requests_per_s: 0.1\n") as server:
        busy, other = server.tokens.create("busy"), server.tokens.create("other")
        answers = [server.post(call_body(), busy) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 429, 429]
        assert 1 <= int(answers[1].headers["Retry-After"]) <= 10
        assert "more than 0.1 requests a second (setting http_requests_per_s)" in answers[1].json()["error"]["message"]
        assert server.post(call_body(), other).status_code == 200
        server.end()
        assert {entry["caller"] for entry in server.audit(why="HTTP status 429")} == {"token busy"}


def test_a_bucket_fills_again_and_never_beyond_its_size() -> None:
    time = [0.0]
    buckets = TokenBuckets(per_s=2, capacity=3, now=lambda: time[0])
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == 0.5
    time[0] = 0.5
    assert buckets.take("a") == 0 and buckets.take("a") == 0.5
    time[0] = 100
    assert [buckets.take("a") > 0 for _ in range(4)] == [False, False, False, True]
    assert buckets.take("b") == 0


def test_a_flood_of_names_does_not_fill_the_memory() -> None:
    buckets = TokenBuckets(per_s=1, capacity=1)
    for number in range(30_000):
        buckets.take(f"fe80::{number:x}")
    assert len(buckets._levels) == 10_000


# --- the middlewares alone


class Exchange:
    """One request whose body comes in parts, when they are let through."""

    def __init__(self, *parts: bytes, stays: bool = False) -> None:
        self.parts = list(parts)
        self.stays = stays
        self.answer: list[Message] = []
        self.cut = anyio.Event()
        peer = Peer(None, None, 1, 1)
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/mcp",
            "headers": [],
            "state": {"peer": peer, "cut": self.cut.set},
        }

    async def receive(self) -> Message:
        if not self.parts and self.stays:
            await anyio.sleep_forever()
        body = self.parts.pop(0) if self.parts else b""
        return {"type": "http.request", "body": body, "more_body": bool(self.parts) or self.stays}

    async def send(self, message: Message) -> None:
        self.answer.append(message)

    @property
    def status(self) -> int:
        return int(self.answer[0]["status"])


async def answer_it(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def test_a_body_of_the_longest_size_goes_through_whole_and_one_byte_more_does_not() -> None:
    limit = BodyLimit(answer_it, 10, 5)
    whole, long = Exchange(b"12345", b"67890"), Exchange(b"12345", b"678901")
    await limit(whole.scope, whole.receive, whole.send)
    await limit(long.scope, long.receive, long.send)
    assert whole.answer[1]["body"] == b"1234567890"
    assert long.status == 413


async def test_bodies_that_come_slowly_together_take_a_bounded_memory() -> None:
    limit = BodyLimit(answer_it, 10, 5)
    held = [Exchange(b"1234567890", stays=True) for _ in range(16)]
    async with anyio.create_task_group() as group:
        for one in held:
            group.start_soon(limit, one.scope, one.receive, one.send)
        await anyio.wait_all_tasks_blocked()
        beyond = Exchange(b"x")
        await limit(beyond.scope, beyond.receive, beyond.send)
        assert beyond.status == 503
        group.cancel_scope.cancel()
    later = Exchange(b"x")
    await limit(later.scope, later.receive, later.send)
    assert later.status == 200


async def test_one_caller_has_so_many_requests_open_and_no_more() -> None:
    go = anyio.Event()

    async def hold(scope: Scope, receive: Receive, send: Send) -> None:
        await go.wait()
        await answer_it(scope, receive, send)

    limit = RateLimit(hold, 1000, 2)
    held, beyond = [Exchange(b"a"), Exchange(b"b")], Exchange(b"c")
    async with anyio.create_task_group() as group:
        for one in held:
            group.start_soon(limit, one.scope, one.receive, one.send)
        await anyio.wait_all_tasks_blocked()
        await limit(beyond.scope, beyond.receive, beyond.send)
        assert beyond.status == 429
        go.set()
    assert [one.status for one in held] == [200, 200]


async def test_a_stream_ends_when_its_token_is_revoked() -> None:
    valid = True

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal valid
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        valid = False
        await send({"type": "http.response.body", "body": b"2", "more_body": True})
        raise NotImplementedError

    exchange = Exchange()
    await SendLimit(stream, lambda _: valid)(exchange.scope, exchange.receive, exchange.send)
    assert exchange.cut.is_set()
    assert [message.get("body") for message in exchange.answer] == [None, b"1"]


async def test_a_client_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rhapsody_mcp.serving.http.limits._SEND_TIMEOUT_S", 0.01)

    async def never(message: Message) -> None:
        await anyio.sleep_forever()

    exchange = Exchange(b"x")
    await SendLimit(answer_it, lambda _: True)(exchange.scope, exchange.receive, never)
    assert exchange.cut.is_set()
