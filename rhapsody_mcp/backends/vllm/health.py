"""Watches a vLLM server that runs: whether it answers, and whether its processes go on."""

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

__all__ = ["ENGINE_DIED", "GONE", "Health"]

ENGINE_DIED = "its engine died"
GONE = "its process is gone"
_MISSES = 3
_SOON_S = 0.1  # after the end of one of its processes the server needs a moment to know of it
_SOON = 20


class Health:
    """Looks every `every_s`, and soon after one of the processes under `keeper` has ended.

    A server is dead at once where its process or one of its engine's is gone, or where it says that its engine died. It
    counts as dead where three looks in a row find no answer, or a process of it stopped: while its engine is, the
    server goes on to answer them, and no request ever ends.
    """

    def __init__(self, address: str, keeper: int, every_s: float) -> None:
        self._address, self._keeper, self._every_s = address, keeper, every_s
        under = descendants(keeper)
        self._server, self._ends = next(iter(under), 0), _Ends(under)
        self._engine = {pid: title for pid in under if (title := _title(pid)).startswith("VLLM::")}
        self._client = httpx2.AsyncClient(trust_env=False, timeout=every_s)

    async def until_dead(self) -> str:
        """Why it is dead, or counts as dead: the end of a sentence about it."""
        misses = soon = 0
        try:
            while misses < _MISSES:
                if await self._ends.any_within(_SOON_S if soon else self._every_s):
                    soon = _SOON
                problem = await self._look()
                if problem == GONE or problem.startswith(ENGINE_DIED):
                    return problem
                misses = misses + 1 if problem else 0
                soon = max(0, soon - 1)
        finally:
            self._ends.close()
            await self._client.aclose()
        return f"{problem}, {_MISSES} times in a row, {self._every_s:g} s apart"

    def hurry(self) -> None:
        """Look soon, and for some seconds often: something speaks for the server's end."""
        self._ends.happened.set()

    async def _look(self) -> str:
        """What is wrong; empty where nothing is."""
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
    """What the process calls itself: vLLM's engine and its workers have names of their own."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode("utf-8", "replace").strip()
    except OSError:
        return ""


class _Ends:
    """Tells when some of these processes end; where the system has no descriptors for processes, nothing ever."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.happened = asyncio.Event()
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
        self.happened.set()

    def _forget(self, descriptor: int) -> None:
        self._descriptors.discard(descriptor)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    async def any_within(self, within_s: float) -> bool:
        """Wait for an end, so long at most; whether there was one since the last time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.happened.wait()
        happened = self.happened.is_set()
        self.happened.clear()
        return happened

    def close(self) -> None:
        for descriptor in list(self._descriptors):
            self._forget(descriptor)
