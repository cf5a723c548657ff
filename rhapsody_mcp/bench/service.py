"""The rows of the service: the same work through an MCP client with a ledger, and the service's own costs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from rhapsody_mcp.api import Session
from rhapsody_mcp.backends import DragonExecutionBackendV3
from rhapsody_mcp.bench.compute import functions
from rhapsody_mcp.bench.measurement import Row
from rhapsody_mcp.engine.process.tree import descendants
from rhapsody_mcp.model.errors import RhapsodyError

__all__ = ["first_reply", "service_rows"]

_PROGRAM = [sys.executable, "-m", "rhapsody_mcp"]
_NO_OP_TASK = {"function": "rhapsody_mcp.bench.bare:no_op"}
_LARGE = f"{__name__}:large"
_LARGE_BYTES = 100_000_000
_BARE_TEXT = "an empty MCP server"
_EMPTY_SERVER = "from mcp.server.mcpserver import MCPServer; MCPServer('empty').run()"


def large(size: int) -> bytes:
    return bytes(size)


class _BenchClient:
    """An MCP client of a separate service, with an open session on Dragon."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client, self.folder = client, folder
        self._session = ""

    async def open(self) -> None:
        self._session = (await self._call("create_session", backends=["dragon"]))["session"]
        await self.run_one()

    async def _call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        result = await self._client.call_tool(tool, arguments)
        if result.is_error:
            raise RhapsodyError(f"{tool} was refused in the benchmark: {result.content}")
        return cast(dict[str, Any], result.structured_content)

    async def _run(self, *tasks: dict[str, Any]) -> float:
        """The seconds from the submission until the client knows that all tasks have ended."""
        began = time.perf_counter()
        submitted = await self._call("submit_tasks", session=self._session, tasks=list(tasks))
        names = list({submitted["first"], submitted["last"]})
        while not (reply := await self._call("wait_tasks", session=self._session, tasks=names))["ended"]:
            pass
        took = time.perf_counter() - began
        if reply["failures"]:
            raise RhapsodyError(f"a task of the benchmark failed: {reply['failures']}")
        return took

    async def run_many(self, count: int) -> float:
        return await self._run({**_NO_OP_TASK, "args": [{"item": True}], "for_each": list(range(count))})

    async def run_one(self) -> float:
        return await self._run({**_NO_OP_TASK, "args": [1]})

    async def pass_on(self) -> float:
        producer = {"name": f"made-{time.time_ns()}", "function": _LARGE, "args": [_LARGE_BYTES]}
        return await self._run(producer, {"function": "builtins:len", "args": [{"ref": producer["name"]}]})

    def service_pid(self) -> int:
        command = [*_PROGRAM, "service", "status", "--json", "--folder", str(self.folder)]
        return int(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["pid"])


@asynccontextmanager
async def _open_client() -> AsyncIterator[_BenchClient]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        folder_option = ["--folder", folder]
        command = [*_PROGRAM, "stdio", "--config", _settings(folder), *folder_option]
        server = StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
        try:
            async with Client(stdio_client(server)) as client:
                yield _BenchClient(client, Path(folder))
        finally:
            await _stop(folder_option)


def _settings(folder: str) -> str:
    """The path of a settings file that allows many tasks without a confirmation."""
    file = Path(folder, "settings.yaml")
    file.write_text("budget_tasks: null\n")
    return str(file)


@asynccontextmanager
async def service_rows(count: int, idle_s: float) -> AsyncIterator[list[Row]]:
    async with _open_client() as client, Session([await DragonExecutionBackendV3()]) as session:
        await client.open()
        service = await asyncio.to_thread(client.service_pid)
        before: list[int] = []

        async def pass_on() -> float:
            before.append(_peak_memory(service))
            return await client.pass_on()

        async def memory_growth() -> float:
            return float(_peak_memory(service) - before[0])

        python = "the same from Python, without a ledger"
        yield [
            Row(
                f"{count:,} functions in one call of submit_tasks",
                partial(client.run_many, count),
                partial(functions, session, count),
                count,
                "rate",
                python,
            ),
            Row(
                "one function: submit_tasks, then wait_tasks",
                client.run_one,
                partial(functions, session, 1),
                bare=python,
            ),
            Row(
                "100 MB from one task to the next",
                pass_on,
                partial(asyncio.to_thread, _write_and_read, client.folder),
                bare="a file written and read",
            ),
            Row("what the service's memory grew by meanwhile", memory_growth, shown="bytes", warm_up=False),
            Row("the idle service", partial(_cpu_share, [service], idle_s), shown="share", warm_up=False),
            Row("its idle Dragon", partial(_cpu_share, descendants(service), idle_s), shown="share", warm_up=False),
        ]


def _write_and_read(folder: Path) -> float:
    data = bytes(_LARGE_BYTES)
    began = time.perf_counter()
    file = folder / "large"
    file.write_bytes(data)
    length = len(file.read_bytes())
    took = time.perf_counter() - began
    file.unlink()
    assert length == _LARGE_BYTES
    return took


def _peak_memory(pid: int) -> int:
    """The peak resident memory, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


async def _cpu_share(pids: Collection[int], seconds: float) -> float:
    """The share of one core that the processes use during so many seconds."""
    before, began = sum(map(_cpu_s, pids)), time.perf_counter()
    await asyncio.sleep(seconds)
    return (sum(map(_cpu_s, pids)) - before) / (time.perf_counter() - began)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- starts


@asynccontextmanager
async def first_reply() -> AsyncIterator[list[Row]]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        folder_option = ["--folder", folder]
        in_process, service = [*_PROGRAM, "stdio", "--in-process"], [*_PROGRAM, "stdio", *folder_option]
        empty = partial(_first_reply, [sys.executable, "-c", _EMPTY_SERVER])
        try:
            yield [
                Row("first reply, --in-process", partial(_first_reply, in_process), empty, bare=_BARE_TEXT),
                Row("first reply, where the service runs", partial(_first_reply, service), empty, bare=_BARE_TEXT),
            ]
        finally:
            await _stop(folder_option)


async def _stop(folder_option: Sequence[str]) -> None:
    command = [*_PROGRAM, "service", "stop", "--force", *folder_option]
    await asyncio.to_thread(partial(subprocess.run, command, check=False, stdout=subprocess.DEVNULL))


async def _first_reply(command: list[str]) -> float:
    """The seconds from the start of the command until a client has its list of tools."""
    began = time.perf_counter()
    async with Client(stdio_client(StdioServerParameters(command=command[0], args=command[1:]))) as client:
        await client.list_tools()
        return time.perf_counter() - began
