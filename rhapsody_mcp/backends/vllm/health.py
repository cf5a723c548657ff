"""Watches a running vLLM server: its health check, and its processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import httpx2

from rhapsody_mcp.engine.process.liveness import is_stopped
from rhapsody_mcp.engine.process.tree import descendants

__all__ = ["ENGINE_DIED", "GONE", "HealthWatch"]

ENGINE_DIED = "its engine died"
GONE = "its process is gone"
_MAX_MISSES = 3
_SOON_S = 0.1  # the server takes a moment to notice the end of one of its processes
_SOON_CHECKS = 20


class HealthWatch:
    """Checks a server every `every_s` seconds, and often for a while after a process under `keeper` has ended.

    The server is dead at once where its process or a process of its engine is gone, or where its health check reports
    a dead engine. It counts as dead where three checks in a row find no answer or a stopped process: a server whose
    engine is stopped still answers health checks, but no request ends.
    """

    def __init__(self, address: str, keeper: int, every_s: float) -> None:
        self._address, self._keeper, self._every_s = address, keeper, every_s
        processes = descendants(keeper)
        self._server, self._exits = next(iter(processes), 0), _ExitWatch(processes)
        self._engine = {pid: title for pid in processes if (title := _title(pid)).startswith("VLLM::")}
        self._client = httpx2.AsyncClient(trust_env=False, timeout=every_s)

    async def until_dead(self) -> str:
        """Wait until the server is dead or counts as dead; returns the reason, as the end of a sentence about it."""
        misses = soon_checks = 0
        try:
            while misses < _MAX_MISSES:
                if await self._exits.any_within(_SOON_S if soon_checks else self._every_s):
                    soon_checks = _SOON_CHECKS
                problem = await self._problem()
                if problem == GONE or problem.startswith(ENGINE_DIED):
                    return problem
                misses = misses + 1 if problem else 0
                soon_checks = max(0, soon_checks - 1)
        finally:
            self._exits.close()
            await self._client.aclose()
        return f"{problem}, {_MAX_MISSES} times in a row, {self._every_s:g} s apart"

    def check_soon(self) -> None:
        """Check the server soon, and often for some seconds, because it may be dying."""
        self._exits.exited.set()

    async def _problem(self) -> str:
        """The server's present problem in words; empty where there is none."""
        living = descendants(self._keeper)
        if self._server not in living:
            return GONE
        if ended := [title for pid, title in self._engine.items() if pid not in living]:
            return f"{ENGINE_DIED}: {ended[0]} ended"
        if stopped := [pid for pid in (self._keeper, *living) if is_stopped(pid)]:
            return f"its process {stopped[0]} was stopped (as by SIGSTOP)"
        try:
            status = (await self._client.get(f"{self._address}/health")).status_code
        except httpx2.HTTPError as error:
            return f"it did not answer its health check ({str(error) or type(error).__name__})"
        return ENGINE_DIED if status == 503 else ""


def _title(pid: int) -> str:
    """The title of the process; vLLM's engine and its workers set titles of their own."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode("utf-8", "replace").strip()
    except OSError:
        return ""


class _ExitWatch:
    """Notices ends of these processes; never on systems without process descriptors (only Linux has them)."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.exited = asyncio.Event()
        self._descriptors: set[int] = set()
        for pid in pids:
            self._watch(pid)

    def _watch(self, pid: int) -> None:
        if sys.platform != "linux":
            return
        with suppress(OSError):
            descriptor = os.pidfd_open(pid)
            self._descriptors.add(descriptor)
            asyncio.get_running_loop().add_reader(descriptor, self._ended, descriptor)

    def _ended(self, descriptor: int) -> None:
        self._forget(descriptor)
        self.exited.set()

    def _forget(self, descriptor: int) -> None:
        self._descriptors.discard(descriptor)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    async def any_within(self, within_s: float) -> bool:
        """Wait for an end, for at most `within_s` seconds; returns whether there was one since the last call."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.exited.wait()
        exited = self.exited.is_set()
        self.exited.clear()
        return exited

    def close(self) -> None:
        for descriptor in list(self._descriptors):
            self._forget(descriptor)
