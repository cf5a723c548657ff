"""The base of the ledger's threads, and the futures with which they answer an event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

__all__ = ["BATCH_S", "MAX_BATCH", "RETRY_S", "ThreadFuture", "WorkerThread"]

MAX_BATCH = 1000
BATCH_S = 0.02
"""How long a thread collects work for one batch."""
RETRY_S = 0.5
"""How long a thread waits before it repeats work that the disk refused."""


class WorkerThread:
    """A daemon thread. `changed` guards and announces new work; `stopping` asks the thread to finish.

    `problem` is empty, or says why work fails now; the thread repeats it every RETRY_S.
    """

    def __init__(self, name: str) -> None:
        self.problem = ""
        self.changed = threading.Condition()
        self.stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self, timeout_s: float) -> bool:
        """Finish the queued work, or try once more. False where an unresponsive disk prevents that in time."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        """The body of the thread."""
        raise NotImplementedError


class ThreadFuture:
    """A future of the running event loop, to be resolved from a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def resolve(self, result: object = None, error: BaseException | None = None) -> None:
        """From the thread; does nothing once the loop is closed or the future is done."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._resolve, result, error)

    def _resolve(self, result: object, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)
