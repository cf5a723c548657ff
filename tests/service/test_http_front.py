"""`rhapsody-mcp http` has the service listen for as long as it lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.bare_client import call
from tests.processes import wait_until
from tests.services import OwnService

pytestmark = pytest.mark.anyio
SLEEPER: list[dict[str, Any]] = [{"name": "long", "executable": "/bin/sleep", "arguments": ["600"]}]


@contextmanager
def front(service: OwnService, *options: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = service.command("http", "--port", "0", *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout
        try:
            yield running, running.stdout.readline().strip().removeprefix("Listening on ")
        finally:
            running.kill()


def is_open(address: str) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", int(address.partition("127.0.0.1:")[2].partition("/")[0]))) == 0


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_when_it_ends_nobody_listens_any_more_and_the_sessions_go_on(
    way: signal.Signals, shared: OwnService
) -> None:
    name = f"http-{way}"
    with anyio.fail_after(600), front(shared) as (running, address):
        async with Client(streamable_http_client(address)) as client:
            await client.call_tool("create_session", {"name": name, "backends": ["local"]})
            await client.call_tool("submit_tasks", {"session": name, "tasks": SLEEPER})
            assert address in shared.status()["listeners"]
        running.send_signal(way)
        assert await anyio.to_thread.run_sync(running.wait) == (-9 if way == signal.SIGKILL else 0)
        await wait_until(lambda: not is_open(address))
        async with shared.bridge() as bridge:
            assert (await call(bridge, "list_tasks", session=name))["total"] == 1
            await call(bridge, "close_session", session=name, force=True)
    assert address not in shared.status()["listeners"]


async def test_clients_over_http_and_over_stdio_share_their_sessions(shared: OwnService) -> None:
    with anyio.fail_after(600), front(shared) as (_, address):
        async with shared.client() as here, Client(streamable_http_client(address)) as there:
            await here.call_tool("create_session", {"name": "met", "backends": ["local"]})
            listed = await there.call_tool("list_sessions", {})
            assert listed.structured_content
            assert "met" in [row["session"] for row in listed.structured_content["sessions"]]
            await there.call_tool("close_session", {"session": "met"})


async def test_it_says_that_the_service_went_away(own: OwnService) -> None:
    with anyio.fail_after(600), front(own) as (running, address):
        os.kill(own.pid, signal.SIGTERM)
        assert await anyio.to_thread.run_sync(running.wait) == 1
        assert running.stderr
        assert "the service went away" in running.stderr.read()
        assert not is_open(address)


def test_what_cannot_be_listened_on_is_refused_in_words(shared: OwnService, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = shared.run("http", "--port", str(taken.getsockname()[1]))
    assert ran.returncode == 1 and "Another program listens there: choose another --port" in ran.stderr
    ran = shared.run("http", "--host", "0.0.0.0", "--port", "0")
    assert ran.returncode == 1 and "--allowed-host NAME" in ran.stderr
    ran = shared.run("http", "--socket", tmp_path / "missing" / "sock")
    assert ran.returncode == 1 and "cannot be made" in ran.stderr
