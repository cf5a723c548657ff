"""A backend as its session uses it: started on need, started again where its engine dies, at rest where it is idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

from rhapsody_mcp.backends.base import RESTARTS, Backend, Ended, Event, Running, restart_delay_s
from rhapsody_mcp.model.errors import BackendError, BackendUnavailable, RhapsodyError
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader

__all__ = ["Lane", "Later", "Notice", "later"]

_log = logging.getLogger(__name__)
_AT_ONCE = 250
"""So many orders are handed over in one step of the event loop."""
_NO_SIGN_OF_LIFE = (Cause.LOST, Cause.CANCELED, Cause.INVALID)
"""A task may end so without an engine."""


class Notice(NamedTuple):
    """What a session has to say about its engines, and when (seconds since the epoch)."""

    at: float
    text: str


class _Timer(Protocol):
    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], object]], _Timer]


def later(delay_s: float, call: Callable[[], object]) -> _Timer:
    """The running loop's own timer."""
    return asyncio.get_running_loop().call_later(delay_s, call)


class Lane:
    """Takes a backend's orders at any time, and keeps those that it cannot have yet.

    An engine that dies is started again 1, 2, 4, 8 and 16 s later while orders wait for it. When five starts in a row
    have brought no task to an end, those orders end FAILED with cause lost, and the next order starts anew. A first
    start that fails is not repeated here. With `idle_s` an engine that has had no task for so long, and that
    `is_needed` does not speak for, is stopped until the next order.
    """

    def __init__(
        self,
        backend: Backend,
        report: Callable[[Running | Ended], None],
        read: Reader,
        *,
        tell: Callable[[Notice], None] = lambda _: None,
        is_needed: Callable[[], bool] = lambda: False,
        idle_s: float | None = None,
        later: Later = later,
    ) -> None:
        self.backend = backend
        self._report, self._read, self._later = report, read, later
        self._tell, self._is_needed, self._idle_s = tell, is_needed, idle_s
        self._ready = self._closed = self._pausing = False
        self._pending: list[TaskRun] = []
        self._live: dict[str, TaskRun] = {}
        self._deaths = 0
        self._why = self._doing = self._told = ""
        backend.on_loss = self._say_lost
        self._opening: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        self._idle: _Timer | None = None

    @property
    def progress(self) -> str:
        """What the engine does, in words; empty where the backend does not say."""
        told = "" if self._pausing else self.backend.progress
        return "; ".join(filter(None, [self._doing, told]))

    # --- what the session asks for

    def take(self, orders: Collection[TaskRun]) -> None:
        """Run these; each ends with an Ended that is reported, whatever happens to the engine."""
        self._stay_awake()
        if self._ready and not self._pending:
            try:
                self._submit(orders)
                return
            except BackendUnavailable as error:
                self._die(str(error))
        self._pending.extend(orders)
        self._open()

    def withdraw(self, uids: Collection[str]) -> set[str]:
        """Take back those of these tasks that the backend does not have; they are reported no more."""
        held = {order.spec.uid for order in self._pending if order.spec.uid in uids}
        self._pending = [order for order in self._pending if order.spec.uid not in held]
        return held

    def cancel(self, uids: Iterable[str]) -> None:
        """Ask the backend to end those of these tasks that it has."""
        if there := [uid for uid in uids if uid in self._live]:
            self.backend.cancel(there)

    async def close(self) -> None:
        """Stop the backend; what it did not have is not reported."""
        self._closed = True
        self._stay_awake()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self._resting is not None:
            await asyncio.wait({self._resting})
        await self.backend.close()

    # --- to the backend

    def _submit(self, orders: Collection[TaskRun]) -> None:
        taken = {order.spec.uid: order for order in orders}
        self._live |= taken
        try:
            self.backend.submit(list(orders), self._hear, self._read)
        except BaseException:
            for uid in taken:
                self._live.pop(uid, None)
            raise

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._live.pop(event.uid, None)
            if event.outcome.cause not in _NO_SIGN_OF_LIFE:
                self._deaths = 0
            self._report(event)
            if not self._live:
                self._rest_when_idle()
        elif isinstance(event, Running):
            self._report(event)
        else:
            self._take_back(self._live.pop(event.uid), event.reason)

    def _take_back(self, order: TaskRun, reason: str) -> None:
        self._die(reason)
        if not self._closed:
            self._pending.append(order)
            self._open()

    def _die(self, reason: str) -> None:
        """Count the end of an engine, once."""
        if self._ready:
            self._ready = False
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._deaths, self._why = self._deaths + 1, reason
        self._say_lost(reason)
        self._told = ""

    def _say_lost(self, reason: str) -> None:
        """Once, though the backend tells at once, and its tasks or the next one later."""
        if reason != self._told:
            self._say(f"backend {self.backend.name!r} lost its engine: {reason}")
        self._told = reason

    def _say(self, text: str) -> None:
        self._tell(Notice(time.time(), text))

    # --- starting

    def _open(self) -> None:
        if self._opening is None and not self._closed:
            self._opening = asyncio.create_task(self._start())

    async def _start(self) -> None:
        """Have the backend take what is pending, or end that."""
        try:
            while self._pending:
                if self._ready:
                    self._hand_over()
                    await asyncio.sleep(0)
                else:
                    await self._rested()
                    await self._try_to_start()
        except RhapsodyError as error:
            cause = Cause.LOST if isinstance(error, BackendError) else Cause.INVALID
            self._refuse(cause, f"backend {self.backend.name!r} did not start: {error}")
        except Exception as error:  # a fault of the backend must not leave its tasks waiting for ever
            _log.exception("backend %r did not start", self.backend.name)
            self._refuse(Cause.LOST, f"backend {self.backend.name!r} failed to start: {error!r}")
        finally:
            self._opening, self._doing = None, ""
            self._carry_on()

    def _carry_on(self) -> None:
        if self._pending and not self._closed:  # what was refused let others begin
            self._open()
        self._rest_when_idle()

    async def _try_to_start(self) -> None:
        if again := self._deaths:
            await self._back_off()
            if not self._pending:
                return
        try:
            await self.backend.start()
        except BackendUnavailable as error:
            if not again:
                raise
            self._fail(str(error))
        else:
            self._ready = True
            self._hand_over()
            if again and self._ready:
                self._say(f"backend {self.backend.name!r} runs again, at attempt {again} of {RESTARTS}")

    def _hand_over(self) -> None:
        orders, self._pending = self._pending[:_AT_ONCE], self._pending[_AT_ONCE:]
        try:
            self._submit(orders)
        except BaseException as error:
            self._pending = [*orders, *self._pending]
            self._die(str(error))
            if not isinstance(error, BackendUnavailable):
                raise

    async def _back_off(self) -> None:
        if self._deaths > RESTARTS:
            raise BackendUnavailable(
                f"its engine was started again {RESTARTS} times and ended each time before a task did; "
                f"the last time: {self._why}"
            )
        self._doing, self._pausing = f"starting again ({self._deaths} of {RESTARTS}) after: {self._why}", True
        over = asyncio.Event()
        timer = self._later(restart_delay_s(self._deaths), over.set)
        try:
            await over.wait()
        finally:
            self._pausing = False
            timer.cancel()

    def _refuse(self, cause: Cause, message: str) -> None:
        orders, self._pending = self._pending, []
        self._deaths = 0
        self._say(message)
        for order in orders:
            outcome = Outcome(state=TaskState.FAILED, ended=time.time(), cause=cause, error=message)
            self._report(Ended(order.spec.uid, outcome))

    # --- resting

    def _stay_awake(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _rest_when_idle(self) -> None:
        self._stay_awake()
        if self._idle_s is not None and self._ready and not self._live and not self._closed:
            self._idle = self._later(self._idle_s, self._rest)

    def _rest(self) -> None:
        self._idle = None
        if self._is_needed():
            self._rest_when_idle()
            return
        self._ready = False
        self._resting = asyncio.create_task(self.backend.rest())
        self._resting.add_done_callback(self._has_rested)

    def _has_rested(self, rest: asyncio.Task[None]) -> None:
        self._resting = None
        if not rest.cancelled() and (error := rest.exception()) is not None:
            _log.error("backend %r did not stop to rest", self.backend.name, exc_info=error)
        self._say(
            f"backend {self.backend.name!r} had no task for {self._idle_s:g} s and was stopped until the next one"
        )

    async def _rested(self) -> None:
        if self._resting is not None:
            await asyncio.wait({self._resting})
