"""Servers whose sessions are shown, and what the tests do on a page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from mcp import Client
from playwright.async_api import Page, expect

from tests.behaviour.test_http import call, connected, serving

__all__ = ["SIMULATE", "call", "local_session", "proxy", "served", "shows"]

SIMULATE = """
import time

def simulate(number):
    print(f"step {number}")
    time.sleep(0.01)
    if number % 10 == 3:
        raise ValueError(f"no convergence after {number} steps")
    return number * number
"""
expect.set_options(timeout=60_000)


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, str]]:
    """A server in a process of its own: the address for MCP, and that of the page."""
    with serving("--port", "0", *arguments) as (_, address):
        yield address, f"{address.removesuffix('/mcp')}/dashboard/"


@asynccontextmanager
async def local_session(page: Page, address: str, *tasks: dict[str, Any], wait: bool = True) -> AsyncIterator[Client]:
    """A client whose session-1, on the local backend, has these tasks, which have ended with `wait`. The page is left
    before the server ends."""
    async with connected(address, "auto") as client:
        await call(client, "create_session", backends=["local"], num_workers=2)
        if tasks:
            await call(client, "submit_tasks", session="session-1", tasks=list(tasks))
        if wait and tasks:
            await call(client, "wait_tasks", session="session-1", timeout_s=50)
        try:
            yield client
        finally:
            await page.goto("about:blank")


async def shows(page: Page, selector: str, text: str) -> None:
    await expect(page.locator(selector).first).to_contain_text(text)


@asynccontextmanager
async def proxy(target: str, prefix: str, *, strips: bool) -> AsyncIterator[str]:
    """The address of a reverse proxy that has the target below a prefix, as JupyterHub and Open OnDemand have."""
    host, port = target.removeprefix("http://").split("/")[0].split(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        answers = asyncio.create_task(pump(up_reader, writer))
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, rest = head.split(b" ", 2)
                assert path.startswith(prefix.encode())
                up_writer.write(b" ".join([method, path[len(prefix) :] if strips else path, rest]))
        except (asyncio.IncompleteReadError, ConnectionError):
            answers.cancel()
        finally:
            up_writer.close()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{prefix}"
