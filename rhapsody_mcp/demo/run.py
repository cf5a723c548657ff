"""Runs the demo as an MCP client of a server of its own."""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO, Any, cast

from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import CallToolResult, TextContent
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rhapsody_mcp.demo import training
from rhapsody_mcp.model.errors import RhapsodyError

__all__ = ["DemoFailed", "run_demo"]

_PROMPT = (
    "Write one labelled sample as JSON: features f1 to f4, each between -3 and 3 with one decimal, and a label, which "
    "is 1 if their sum is positive, else 0. This is sample number "
)
_LOG_LINES = 20


class DemoFailed(RhapsodyError):
    """A step of the demo failed; the text says which step and why."""

    code = "demo_failed"


async def run_demo(model: str, samples: int) -> int:
    """Run the demo; returns the exit code. All printed facts come from the server's replies."""
    console = Console(highlight=False, soft_wrap=True)
    failures: list[Exception] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        try:
            async with _DemoClient.connected(console, log) as client:
                await _pipeline(client, model, samples)
        except* (DemoFailed, MCPError, OSError) as errors:
            failures.append(errors)
        for failure in failures:
            _print_failure(console, failure, log)
    return len(failures)


async def _pipeline(client: _DemoClient, model: str, samples: int) -> None:
    session = (await client.call("create_session", model=model))["session"]
    client.start_counting()
    await client.call("submit_tasks", session=session, tasks=_tasks(samples))
    while not (waited := await client.call("wait_tasks", session=session, timeout_s=55))["ended"]:
        pass
    if waited["failures"]:
        raise DemoFailed(_failures_text(waited["failures"]))
    result = next(row["result"] for row in waited["done"] if row["name"] == "train")
    client.show_result(result)
    client.show_statistics(await client.call("get_statistics", session=session))
    await client.call("close_session", session=session)


def _tasks(samples: int) -> list[dict[str, Any]]:
    prompts = [f"{_PROMPT}{number}." for number in range(1, samples + 1)]
    source = inspect.getsource(training)
    return [
        {
            **{"name": "samples", "prompt": prompts, "temperature": 1.0, "max_tokens": 200},
            "json_schema": training.SCHEMA,
        },
        {"name": "train", "source": source, "entry": "train", "args": [{"ref": "samples"}]},
    ]


class _DemoClient:
    """Calls the server's tools, shows their progress, and counts the calls."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client, self._console = client, console
        self._calls, self._began = 0, time.monotonic()

    @classmethod
    @asynccontextmanager
    async def connected(cls, console: Console, log: IO[str]) -> AsyncIterator[_DemoClient]:
        """A client of a new server process, whose stderr goes to `log`."""
        command = ["-m", "rhapsody_mcp", "stdio", "--in-process"]
        server = StdioServerParameters(command=sys.executable, args=command, env=dict(os.environ))
        async with Client(stdio_client(server, errlog=cast(Any, log))) as client:
            yield cls(client, console)

    def start_counting(self) -> None:
        self._calls, self._began = 0, time.monotonic()

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The structured reply. Raises DemoFailed where the server refuses the call."""
        self._calls += 1
        with self._progress_bars() as bars:
            bar = bars.add_task(tool, total=None)

            async def show_progress(progress: float, total: float | None, message: str | None) -> None:
                bars.update(bar, description=f"{tool}  {message or ''}")

            result = await self._client.call_tool(tool, arguments, progress_callback=show_progress)
        if result.is_error:
            raise DemoFailed(f"{tool} was refused. {_reply_text(result)}")
        self._console.print(f"[bold cyan]{tool}[/]", style="", end="  ")
        self._console.print(_reply_text(result).splitlines()[0], markup=False)
        return cast(dict[str, Any], result.structured_content)

    def _progress_bars(self) -> Progress:
        columns = (SpinnerColumn(), BarColumn(bar_width=10), TimeElapsedColumn(), TextColumn("{task.description}"))
        return Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)

    def show_result(self, result: dict[str, Any]) -> None:
        """Print the training task's result, and the number of calls."""
        elapsed = time.monotonic() - self._began
        self._console.print("\nThe model wrote, for example:")
        for example in result["examples"]:
            self._console.print(f"  {_value_text(example)}", markup=False)
        self._console.print("\nThe classifier that was trained on it:")
        for name, value in result.items():
            if name != "examples":
                self._console.print(f"  {name.replace('_', ' ')}: {_value_text(value)}", markup=False)
        self._console.print(
            f"\n{self._calls} tool calls from the open session to the trained result, in {elapsed:.1f} s, "
            "engines started on the way.\n"
        )

    def show_statistics(self, statistics: dict[str, Any]) -> None:
        table = Table("tasks", "states", "avg total", "avg queue", "avg execution")
        states = ", ".join(f"{count} {state}" for state, count in statistics["counts"].items())
        times = [f"{statistics['times_s'][name]['mean']:.4f} s" for name in ("total", "queue", "execution")]
        table.add_row(str(statistics["total_tasks"]), states, *times)
        self._console.print(table)


def _reply_text(result: CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


def _value_text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _failures_text(failures: list[dict[str, Any]]) -> str:
    return "; ".join(f"{', '.join(group['tasks'])} ended with {group['cause']}: {group['error']}" for group in failures)


def _print_failure(console: Console, failure: Exception, log: IO[str]) -> None:
    while isinstance(failure, ExceptionGroup):
        failure = failure.exceptions[0]
    console.print(f"The demo failed: {failure}", markup=False)
    log.seek(0)
    if last_lines := log.read().splitlines()[-_LOG_LINES:]:
        console.print("The server's last words:", *last_lines, sep="\n  ", markup=False)
    console.print("`rhapsody-mcp doctor` says what is there and what is missing.", markup=False)
