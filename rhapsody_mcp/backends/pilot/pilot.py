"""The pilot: it runs the backends of a session on the nodes of an allocation.

    python -P -m rhapsody_mcp.backends.pilot.pilot

The configuration is in the environment variable RHAPSODY_PILOT. The pilot dials the service, and goes on while no
service answers: it keeps what it has to report until a service has taken it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.base import Ended
from rhapsody_mcp.backends.compute.nodes.result_files import delete_files
from rhapsody_mcp.backends.pilot.delivery import Delivery
from rhapsody_mcp.backends.pilot.hosted import HostedBackend
from rhapsody_mcp.backends.pilot.messages import Body, Events, FromService, PilotConfig, PilotReady, Release
from rhapsody_mcp.backends.pilot.saved_events import save_events
from rhapsody_mcp.engine.network.dial import dial
from rhapsody_mcp.engine.network.files import FileServer
from rhapsody_mcp.engine.network.multiplexer import Multiplexer, Stream
from rhapsody_mcp.engine.process.gc_tuning import collect_less
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.engine.task.node_files import RESULTS
from rhapsody_mcp.engine.task.start_log import read_starts
from rhapsody_mcp.schedulers.allocation import current_allocation

__all__ = ["DEADLINE", "PILOT", "main"]

PILOT = "RHAPSODY_PILOT"
"""The environment variable with the configuration of a pilot."""
_REDIAL_S = (0.5, 5.0)
_LAST_WORDS_S = 5.0
_CHECK_S = 1.0
_STOP_S = 20.0
"""How long before the end of the allocation the pilot ends the tasks that still run, in seconds; at most half of the
time in which it starts none."""
_TIME_IS_UP = "the time of its allocation was up"
_ENDS_SOON = "the time of the allocation is nearly up"
DEADLINE = "RHAPSODY_DEADLINE"
"""The environment variable that tells tasks when their allocation ends, in seconds since the epoch."""


def main() -> int:
    config = msgspec.json.decode(os.environ.pop(PILOT), type=PilotConfig)
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    collect_less()
    folder = RunDir()
    (folder.path / RESULTS).mkdir()
    try:
        asyncio.run(_serve(config, folder.path))
    finally:
        folder.remove()
    return 0


async def _serve(config: PilotConfig, folder: Path) -> None:
    await _Pilot(config, folder).serve()


class _Pilot:
    """Serves one service after the other, until the nodes are given back."""

    def __init__(self, config: PilotConfig, folder: Path) -> None:
        self._config, self._folder, self._results = config, folder, str(folder / RESULTS)
        allocation = current_allocation(os.environ)
        self._ends = (allocation and allocation.ends_at) or time.time() + 60 * config.minutes
        self._nodes = allocation.nodes if allocation is not None else ()
        os.environ[DEADLINE] = f"{self._ends:.0f}"
        self._delivery: Delivery[FromService] = Delivery(
            self._receive, on_hello=self._on_hello, on_delivered=self._on_delivered
        )
        self._released = asyncio.Event()
        self._is_draining = False
        self._end_reason = "its nodes were given back"
        self._last_contact = asyncio.get_running_loop().time()
        self._connection: Multiplexer | None = None
        started_before = read_starts(config.folder)
        self._backends = {
            plan.name: HostedBackend(
                plan,
                self._delivery.send,
                str(folder),
                self._fetch_from,
                lambda: self._delivery.is_connected,
                started_before,
            )
            for plan in config.backends
        }

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        talking = [asyncio.create_task(self._keep_connected()), asyncio.create_task(self._delivery.keep_alive())]
        loop.call_later(self._left_s() - self._config.drain_s, self._drain)
        stop_s = min(_STOP_S, self._config.drain_s / 2)
        loop.call_later(self._left_s() - stop_s, self._end, _TIME_IS_UP)
        while not self._released.is_set() and not self._is_orphaned():
            with suppress(TimeoutError):
                async with asyncio.timeout(_CHECK_S):
                    await self._released.wait()
            if self._is_draining and not self._has_tasks():
                self._end(_ENDS_SOON)
        if self._end_reason == _TIME_IS_UP:
            await asyncio.gather(*(backend.stop_tasks(self._end_reason) for backend in self._backends.values()))
        await asyncio.gather(*(backend.close(self._end_reason) for backend in self._backends.values()))
        saved = save_events(Path(self._config.folder), self._folder.name, self._delivery.unacknowledged)
        await self._deliver_rest()
        if saved is not None and not self._delivery.unacknowledged:
            with suppress(OSError):
                saved.unlink()
        for task in talking:
            task.cancel()
        if self._connection is not None:
            await self._connection.close_and_wait(_LAST_WORDS_S)

    def _left_s(self) -> float:
        """The seconds until the end of the allocation."""
        return max(0.0, self._ends - time.time())

    def _on_signal(self) -> None:
        """The scheduler ends the job."""
        self._end("the scheduler ended its allocation: it was canceled or preempted, or its time was up")

    def _end(self, reason: str) -> None:
        if not self._released.is_set():
            self._end_reason = reason
            self._released.set()

    def _drain(self) -> None:
        self._is_draining = True
        for backend in self._backends.values():
            backend.drain(_ENDS_SOON)

    def _has_tasks(self) -> bool:
        return any(backend.has_tasks for backend in self._backends.values())

    def _is_orphaned(self) -> bool:
        """Whether nobody has spoken to this pilot for too long, and nothing is left to do. What the pilot still has to
        report is something to do, unless the folder of the session can keep it."""
        now = asyncio.get_running_loop().time()
        if self._delivery.is_connected or self._has_tasks() or self._has_news():
            self._last_contact = now
        return now - self._last_contact > self._config.orphan_s

    def _has_news(self) -> bool:
        is_news = any(isinstance(body, Events) for body in self._delivery.unacknowledged)
        return is_news and not os.path.isdir(self._config.folder)

    async def _deliver_rest(self) -> None:
        """Wait a moment until the service has acknowledged everything."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._delivery.is_connected and self._delivery.unacknowledged:
                    await self._delivery.acknowledged.wait()

    # --- the connection

    async def _keep_connected(self) -> None:
        delay_s = _REDIAL_S[0]
        while True:
            addresses, port = self._address()
            connection = await dial(addresses, port, self._config.pem, self._multiplexer)
            if connection is not None:
                delay_s = _REDIAL_S[0]
                self._connection = connection
                self._delivery.connect(connection)
                await connection.lost.wait()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _REDIAL_S[1])

    def _address(self) -> tuple[list[str], int]:
        """The addresses of the service that has the session now: as its file says, else as the job script says."""
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(Path(self._config.address_file).read_bytes(), type=tuple[list[str], int])
        return self._config.addresses, self._config.port

    def _multiplexer(self) -> Multiplexer:
        return Multiplexer(is_server=False, open_stream=self._serve_file)

    def _serve_file(self, stream: Stream, kind: bytes) -> None:
        FileServer(stream, lambda path: os.path.dirname(path) == self._results)

    async def _fetch_from(self) -> Multiplexer:
        await self._delivery.connected.wait()
        assert self._connection is not None, "it is connected"
        return self._connection

    # --- what the service asks for

    def _on_hello(self) -> None:
        sees_folder = os.path.isdir(self._config.folder)
        self._delivery.send(PilotReady(socket.gethostname(), str(self._folder), sees_folder, self._ends, self._nodes))
        for backend in self._backends.values():
            backend.report_state()

    def _on_delivered(self, body: Body) -> None:
        """Delete the files of results that the service has recorded."""
        if isinstance(body, Events):
            for event in body.events:
                if isinstance(event, Ended):
                    delete_files(event.outcome, self._results)

    def _receive(self, order: FromService, number: int) -> None:
        if isinstance(order, Release):
            self._released.set()
        else:
            self._backends[order.backend].receive(order)
        self._delivery.settle(number)


if __name__ == "__main__":
    sys.exit(main())
