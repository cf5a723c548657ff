"""Runs the vLLM servers of one node of several, and reports to the backend on another node.

python -P -m rhapsody_mcp.backends.vllm.node_servers CONFIG
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.vllm.backend import DragonVllmInferenceBackend
from rhapsody_mcp.backends.vllm.nodes import NodeServersConfig
from rhapsody_mcp.engine.messages import FromServers, ServersLost, ServersReady, ServersRefused
from rhapsody_mcp.engine.transport import frame
from rhapsody_mcp.model.errors import BackendUnavailable, RhapsodyError

__all__ = ["main"]

_CHECK_S = 0.5


def main() -> None:
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=NodeServersConfig)
    asyncio.run(_serve(config))


async def _serve(config: NodeServersConfig) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    reader, writer = await asyncio.open_unix_connection(config.address)
    backend = DragonVllmInferenceBackend(**config.arguments)
    backend.api_key = config.api_key
    reporting = asyncio.create_task(_report(backend, writer))
    closed = asyncio.create_task(reader.read())
    waiting = asyncio.create_task(ended.wait())
    await asyncio.wait({reporting, closed, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (reporting, closed, waiting):
        task.cancel()
    await backend.close()


async def _report(backend: DragonVllmInferenceBackend, writer: asyncio.StreamWriter) -> None:
    """Start the servers; report which of them answer, again after each change. Returns when none is left."""
    host = socket.gethostname()

    def send(message: FromServers) -> None:
        writer.write(frame([message]))

    reasons = [""]
    backend.on_loss = reasons.append
    try:
        await backend.start()
    except RhapsodyError as error:
        send(ServersRefused(host, str(error), isinstance(error, BackendUnavailable)))
        await writer.drain()
        return
    reported: set[int] = set()
    while ports := backend.living_ports():
        if lost := reported - ports:
            send(ServersLost(sorted(lost), reasons[-1]))
        if ports - reported:
            send(ServersReady(host, sorted(ports)))
        reported = ports
        await asyncio.sleep(_CHECK_S)
    send(ServersLost(sorted(reported), reasons[-1]))
    await writer.drain()


if __name__ == "__main__":
    main()
