"""In a notebook: an interrupt of its kernel leaves the tasks alone, a restart leaves nothing of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager

from tests.processes import family, wait_until

pytestmark = pytest.mark.anyio
_MOST_S = 600.0

OPEN = """
from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import {backend}

session = Session([await {backend}(num_workers=1)])
first = ComputeTask(abs, args=(-1,))
long = ComputeTask(executable="sh", arguments=["-c", "touch {up}; sleep 300"])
await session.submit_tasks([first, long])
await first
print(first.return_value)
"""
AGAIN = """
more = ComputeTask(abs, args=(-2,))
await session.submit_tasks([more])
await more
print(long.state, more.return_value)
"""


@pytest.fixture
async def kernel() -> AsyncIterator[AsyncKernelManager]:
    manager = AsyncKernelManager(kernel_name="python3")
    await manager.start_kernel()
    try:
        yield manager
    finally:
        await manager.shutdown_kernel(now=True)


async def connected(manager: AsyncKernelManager) -> AsyncKernelClient:
    client: AsyncKernelClient = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=_MOST_S)
    return client


async def said(client: AsyncKernelClient, code: str) -> str:
    """What a cell prints, or the name of the exception that ends it."""
    printed: list[str] = []

    def note(message: dict[str, dict[str, str]]) -> None:
        printed.append(message["content"].get("text") or message["content"].get("ename") or "")

    await client.execute_interactive(code, timeout=_MOST_S, output_hook=note)
    return "".join(printed)


@pytest.mark.parametrize("backend", ["DragonExecutionBackendV3", "LocalExecutionBackend"])
async def test_an_interrupt_harms_no_task_and_a_restart_leaves_nothing(
    kernel: AsyncKernelManager, backend: str, tmp_path: Path
) -> None:
    client = await connected(kernel)
    assert await said(client, OPEN.format(backend=backend, up=tmp_path / "up")) == "1\n"
    await wait_until((tmp_path / "up").exists)

    async with anyio.create_task_group() as group:
        ends: list[str] = []

        async def wait() -> None:
            ends.append(await said(client, "print('waiting', flush=True)\nawait long"))

        group.start_soon(wait)
        while not ends:
            await kernel.interrupt_kernel()
            await anyio.sleep(0.5)  # until it is in the cell, an interrupt has nothing to interrupt
    assert ends[0].endswith(("CancelledError", "KeyboardInterrupt"))
    assert await said(client, AGAIN) == "RUNNING 2\n"

    assert family("sleep", "300")
    await kernel.restart_kernel(now=True)
    await wait_until(lambda: not family("sleep", "300") and not family("rhapsody_mcp.engine"))
    client.stop_channels()
    client = await connected(kernel)
    assert await said(client, "print(6 * 7)") == "42\n"
    client.stop_channels()
