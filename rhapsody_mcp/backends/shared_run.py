"""Runs something that several callers wait for, once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["SharedRun"]


class SharedRun:
    """One run of `make()` at a time. A caller that is canceled does not end the run."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._make = make
        self._run: asyncio.Task[None] | None = None

    @property
    def goes_on(self) -> bool:
        return self._run is not None

    async def join(self) -> None:
        """Wait for the run that goes on, else for a new one; raise what it raises."""
        if self._run is None:
            self._run = asyncio.create_task(self._make())
            self._run.add_done_callback(self._forget)
        await asyncio.shield(self._run)

    def _forget(self, _: asyncio.Task[None]) -> None:
        self._run = None

    async def until_none(self) -> None:
        """Wait until no run goes on."""
        while self._run is not None:
            await asyncio.wait({self._run})

    async def cancel(self) -> None:
        """Cancel the run that goes on, and wait for its end."""
        if self._run is not None:
            self._run.cancel()
            await asyncio.gather(self._run, return_exceptions=True)
