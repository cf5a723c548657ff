"""The seam between a session and whatever runs its tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Generator, Sequence
from typing import Any, Literal, Protocol, Self, runtime_checkable

import msgspec

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.values import Reader

__all__ = [
    "Awaitable",
    "Backend",
    "BeforeStart",
    "Ended",
    "EngineBook",
    "Event",
    "Kind",
    "OnLoss",
    "Report",
    "Returned",
    "Running",
]

Kind = Literal["function", "executable", "prompt"]


class Running(msgspec.Struct, frozen=True, gc=False):
    """The task's user code has started, at this time (seconds since the epoch)."""

    uid: str
    at: float


class Ended(msgspec.Struct, frozen=True, gc=False):
    """The task has reached a final state, and no process of it is left."""

    uid: str
    outcome: Outcome


class Returned(msgspec.Struct, frozen=True, gc=False):
    """The backend gives the task back, with no Running of it before and none of it ever to run: its engine has ended.

    `reason` is a sentence. Whoever handed the task over may hand it over again, to the same backend too.
    """

    uid: str
    reason: str = ""


Event = Running | Ended | Returned
Report = Callable[[Event], None]


@runtime_checkable
class Backend(Protocol):
    """Runs tasks. One object serves one session; every method is called in the session's event loop."""

    name: str
    """What tasks say in `backend` to come here; the session refuses two backends of one name."""

    @property
    def kinds(self) -> Collection[Kind]:
        """The kinds of task that this backend runs."""

    def check(self, spec: TaskSpec) -> None:
        """Raise InvalidTask for what can be known to be wrong before submission. No I/O, no waiting."""

    async def start(self) -> None:
        """Get ready to run tasks. A second call waits for the first and then does nothing.

        Raises InvalidSettings where starting again would fail again, BackendUnavailable otherwise. Nothing is
        left running after a failed or cancelled start, and it may be tried again.
        """

    def submit(self, orders: Sequence[TaskRun], report: Report, read: Reader) -> None:
        """Take these tasks; the backend has started. Never blocks and never raises for a task.

        Raises BackendUnavailable, with nothing taken, where the engine has died; `start` makes a new one.
        For each order `report` is called from the event loop with at most one Running and then exactly one
        Ended, also when the backend is closed. Where the engine dies, what had started, or may have, ends with cause
        lost; what certainly never did, and never will, may get one Returned instead of all that. `read` opens bound
        values here, outside the processes that run user code: it may refuse one with InvalidTask.
        """

    def cancel(self, uids: Collection[str]) -> None:
        """Ask for these tasks to end CANCELED, with their process trees. Unknown and ended uids are ignored.

        A task that ends by itself before the request reaches it keeps its own outcome.
        """

    async def rest(self) -> None:
        """End the engine, as nothing needs it now; `start` makes a new one. Called while no task is here.

        Returns when no process of it is left. Nothing happens where none runs.
        """

    async def close(self) -> None:
        """End every task and process, then return. A second call does nothing. Survives cancellation of its
        caller: nothing is left running in either case."""

    def describe(self) -> dict[str, Any]:
        """What this backend is and has, in plain JSON data; no secrets, no waiting."""


class EngineBook(Protocol):
    """Where a backend writes down the engines that it starts, so that what a crash leaves of them can be ended later.

    A backend with the attribute `book` calls it in the event loop; None is for one that keeps no book.
    """

    async def opened(self, mark: str, kind: Literal["dragon", "local", "vllm"], folder: str) -> None:
        """An engine is about to be started: its processes will carry `mark`, its files lie in `folder`. Returns when
        that is on the disk; where this raises, nothing is started."""

    def placed(self, mark: str, pid: int, started: int) -> None:
        """Its keeper runs: this process, with the start time that the kernel gives it (0 where that is not known)."""

    def closed(self, mark: str) -> None:
        """No process and no file of it is left."""


BeforeStart = Callable[[Sequence[str]], Coroutine[Any, Any, bool]]
"""A backend with the attribute `before_start` awaits it, where it is not None, with the uids of tasks of which any may
start afterwards if it gives True; it never raises. So whoever writes down what has started knows of each that may have.
After False the backend is about to be closed."""


OnLoss = Callable[[str], None]
"""A backend with the attribute `on_loss` calls it with the reason when a part of its engine is lost, also while it has
no task."""


class Awaitable:
    """Makes `await backend` start a backend and give it back, as in `backend = await Backend()`, and closes it once;
    `async with backend` does both."""

    _closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        raise NotImplementedError

    async def rest(self) -> None:
        """A backend without processes of its own has none to stop."""

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return await self.initialize()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.initialize().__await__()

    async def initialize(self) -> Self:
        """Start the backend; the same as `await backend`."""
        await self.start()
        return self
