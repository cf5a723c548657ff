"""The server as a process of its own, spoken to without a client library."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
from anyio.abc import Process

__all__ = ["COMMAND", "busy_server", "call"]

COMMAND = [sys.executable, "-m", "rhapsody_mcp", "stdio", "--in-process"]
_TASKS = [
    {"name": "stubborn", "source": "def wait():\n    import subprocess\n    subprocess.run(['sleep', '600'])"},
    {"name": "away", "executable": "/bin/sh", "arguments": ["-c", "setsid sleep 600 & sleep 600"]},
]


@asynccontextmanager
async def busy_server(*backends: str) -> AsyncIterator[Process]:
    """A server in the middle of tasks that would not end by themselves, every backend started."""
    async with await anyio.open_process(COMMAND, env=dict(os.environ), stderr=None) as server:
        await call(server, "create_session", backends=backends)
        prompts = [{"name": "ai", "prompt": "Write a sample."}] if "vllm" in backends else []
        await call(server, "submit_tasks", session="session-1", tasks=[*_TASKS, *prompts])
        counts = {"RUNNING": len(_TASKS)} | ({"DONE": 1} if prompts else {})
        while (state := await call(server, "wait_tasks", session="session-1", count=1, timeout_s=0.2))[
            "counts"
        ] != counts:
            assert not state["failures"], state
        yield server


async def call(server: Process, tool: str, **arguments: Any) -> dict[str, Any]:
    """One call, in the revision of the protocol that needs no handshake."""
    assert server.stdin and server.stdout
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {"name": tool, "arguments": arguments, "_meta": meta}
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    await server.stdin.send(json.dumps(request).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        line += await server.stdout.receive()
    return cast(dict[str, Any], json.loads(line)["result"]["structuredContent"])
