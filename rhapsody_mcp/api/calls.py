"""The calls of an executor: tasks that come to a session from any thread, and whose ends go into futures."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from rhapsody_mcp.api.session import Session
from rhapsody_mcp.model.errors import InvalidTask, SessionClosed
from rhapsody_mcp.model.outcome import TaskFailed
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value
from rhapsody_mcp.runtime.serialization import Encoder
from rhapsody_mcp.runtime.session.steps import TASKS_PER_STEP
from rhapsody_mcp.runtime.tasks import ComputeTask

__all__ = ["Call", "Calls", "OwnCalls", "ProcessDied", "RemoteTraceback"]

_THREADS = 4
_DIED = (Cause.CRASHED, Cause.LOST, Cause.MEMORY)


class RemoteTraceback(Exception):
    """The traceback, as text, of a function that raised in another process; `tb`, as in the standard library."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


class ProcessDied(TaskFailed, BrokenExecutor):
    """The process of a call ended before the call did. The executor goes on, and so do its other calls.

    It is a BrokenExecutor for programs that look for the end of a worker in this way.
    """


class Call(ComputeTask):
    """A task that tells a future of its start and its end, in the thread of the event loop.

    Once it has ended, the future alone has its result, and the session neither the function nor the arguments.
    """

    __slots__ = ("_begun", "_calls", "_promise")

    def __init__(
        self, calls: Calls, function: Callable[..., Any], options: Mapping[str, Any], **arguments: Any
    ) -> None:
        self._promise: Future[Any] | None = Future()
        self._calls, self._begun = calls, False
        super().__init__(function, **arguments, **options)

    @property
    def state(self) -> TaskState:
        return vars(self)["state"]  # type: ignore[no-any-return]

    @state.setter
    def state(self, state: TaskState) -> None:
        vars(self)["state"] = state
        if state is TaskState.RUNNING:
            self.begin()

    @property
    def promise(self) -> Future[Any] | None:
        """The future of the caller; None once it has ended."""
        return self._promise

    def begin(self) -> None:
        """Have the future run, or hear that it was canceled."""
        if not self._begun and self._promise is not None:
            self._begun = True
            self._promise.set_running_or_notify_cancel()

    def complete_future(self) -> None:
        super().complete_future()
        if self.state.final and self._promise is not None:
            value, error = self.return_value, _error_of(self)
            self._release()
            if self.cause is Cause.CANCELED and not self._begun:
                self._promise.cancel()
            self.settle(value, error)

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """End the future, unless it was canceled."""
        promise = self._promise
        if promise is None:
            return
        self.begin()
        self._promise = None
        if not promise.cancelled():
            promise.set_result(value) if error is None else promise.set_exception(error)
        self._calls.forget(self)

    def spec(self, encoder: Encoder) -> TaskSpec:
        if isinstance(self.function, _Gone):
            raise InvalidTask(
                "it was a call of an executor, which has ended and of which the session keeps no function. Call again: "
                "executor.submit(function, ...).",
                uid=self.uid,
            )
        return super().spec(encoder)

    def _release(self) -> None:
        self.function, self.args, self.kwargs = _Gone(self.what), (), {}
        self.return_value = self.raised = None
        if self.outcome is not None and self.outcome.value is not None and not self.passed_on:
            self.outcome = replace(self.outcome, value=self._without_data(self.outcome.value))

    def _without_data(self, value: Value) -> Value:
        if value.format == "files":
            return value
        if value.file is not None:
            Path(value.file).unlink(missing_ok=True)
        return replace(value, data=None, file=value.file or f"the result of {self.uid}")


class _Gone:
    """Stands for the function of a call that has ended."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self) -> None:
        raise NotImplementedError


def _error_of(call: Call) -> BaseException | None:
    """What the future raises: the function's own exception, where it could be sent."""
    failure, raised = call.exception, call.raised
    if failure is None or call.outcome is None:
        return None
    if raised is not None:
        raised.__cause__ = RemoteTraceback(call.traceback)
        return raised
    if call.outcome.cause in _DIED:
        return ProcessDied(str(failure), call.outcome, call, call.uid)
    return failure


class Calls:
    """Hands calls of any thread to a session in steps, one wake-up of the event loop for all that came meanwhile.

    The session is that of a program, which closes the session itself.
    """

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self.session, self._loop = session, loop
        self._lock = threading.RLock()  # a finalizer may come while the lock is held
        self._new: deque[Call] = deque()
        self._to_cancel: list[Call] = []
        self._open: set[Call] = set()
        self._is_awake = False
        self._refusal = ""
        self._background: set[asyncio.Task[Any]] = set()
        _all.add(self)

    # --- in any thread

    def submit(self, call: Call) -> Future[Any]:
        """Raises RuntimeError after `shut_down`."""
        promise = call.promise
        assert promise is not None
        with self._lock:
            if self._refusal:
                raise RuntimeError(self._refusal)
            self._open.add(call)
            self._new.append(call)
        promise.add_done_callback(lambda future: self._cancel([call]) if future.cancelled() else None)
        self._wake()
        return promise

    def shut_down(self, *, cancel: bool = False, stop: bool = False) -> None:
        """Take no more calls. With `cancel`, cancel those that have not started; with `stop`, all others too."""
        with self._lock:
            self._refusal = self._refusal or "cannot schedule new futures after shutdown"
            still_open = list(self._open)
        for call in still_open if cancel or stop else ():
            if (promise := call.promise) is not None:
                promise.cancel()
        if stop:
            self._cancel(still_open)
        self._wake()

    def join(self) -> None:
        """Return once all calls have ended, after `shut_down`; in the thread of the event loop at once."""
        if not self._is_here():
            self._join()

    def _join(self) -> None:
        with self._lock:
            promises = [promise for call in self._open if (promise := call.promise) is not None]
        wait(promises)

    def _is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _cancel(self, calls: Sequence[Call]) -> None:
        with self._lock:
            self._to_cancel += calls
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._is_awake and not self._loop.is_closed():
                return
            self._is_awake = True
        try:
            self._loop.call_soon_threadsafe(self._begin_steps)
        except RuntimeError:  # the loop is closed
            self._give_up()

    def _give_up(self) -> None:
        """End what no event loop will end."""
        with self._lock:
            self._refusal = self._refusal or "cannot schedule new futures: the event loop of the session has ended"
            left, self._open, self._is_awake = self._open, set(), False
        for call in left:
            call.settle(None, SessionClosed(f"{call.uid}: the event loop of its session has ended."))

    def abandon(self) -> None:
        """In a fork of the process, where the event loop does not run."""
        self._lock = threading.RLock()
        self._refusal = "this executor belongs to the process that made it; make one in this process"
        self._open, self._is_awake = set(), True

    # --- in the event loop

    def _begin_steps(self) -> None:
        self._spawn(self._steps())

    def _spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _steps(self) -> None:
        while step := self._next_step():
            new, canceled = step
            await self._submit(new)
            self._end_canceled(canceled)
            await asyncio.sleep(0)

    def _next_step(self) -> tuple[list[Call], list[Call]] | None:
        with self._lock:
            new = [self._new.popleft() for _ in range(min(len(self._new), TASKS_PER_STEP))]
            canceled, self._to_cancel = self._to_cancel, []
            self._is_awake = bool(new or canceled)
        return (new, canceled) if new or canceled else None

    async def _submit(self, calls: Sequence[Call]) -> None:
        wanted = []
        for call in calls:
            if call.promise is not None and call.promise.cancelled():
                call.settle(None)
            else:
                wanted.append(call)
        try:
            await self.session.submit_tasks(wanted)
        except (Exception, SystemExit) as error:  # pickling runs the user's own code
            if len(wanted) == 1:
                wanted[0].settle(None, error)
            else:
                for call in wanted:
                    await self._submit([call])

    def _end_canceled(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if call.promise is not None and call.promise.cancelled():
                call.begin()
        if ending := [call for call in calls if call.state is not TaskState.NEW and not call.state.final]:
            self._spawn(self.session.cancel(ending))

    def forget(self, call: Call) -> None:
        """The call has ended."""
        with self._lock:
            self._open.discard(call)


class OwnCalls(Calls):
    """Calls with an event loop in a thread of their own, at whose end the session is closed."""

    def __init__(self, session: Session) -> None:
        self._drained, self._helpers = asyncio.Event(), _started_threads()
        super().__init__(session, asyncio.new_event_loop())
        self._loop.set_default_executor(self._helpers)
        # a daemon, so that an interrupted wait at the end of the program ends the program
        self._thread = threading.Thread(target=self._run, name=f"executor of {session.uid}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._helpers.shutdown()
            self._loop.close()
            self._give_up()

    async def _serve(self) -> None:
        async with self.session:
            await self._drained.wait()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _join(self) -> None:
        self._thread.join()

    async def _steps(self) -> None:
        await super()._steps()
        self._end_when_drained()

    def forget(self, call: Call) -> None:
        super().forget(call)
        self._end_when_drained()

    def _end_when_drained(self) -> None:
        with self._lock:
            if self._refusal and not self._open and not self._is_awake:
                self._drained.set()


def _started_threads() -> ThreadPoolExecutor:
    """Threads for an event loop, all of which run: at the end of a program, some versions of Python start no others."""
    threads, all_run = ThreadPoolExecutor(_THREADS), threading.Barrier(_THREADS)
    try:
        for _ in range(_THREADS):
            threads.submit(all_run.wait)
    except BaseException:
        all_run.abort()
        raise
    return threads


_all: weakref.WeakSet[Calls] = weakref.WeakSet()


def _finish_all() -> None:
    """Wait for the calls of executors that were not shut down, as the executors of the standard library do."""
    for calls in [calls for calls in _all if isinstance(calls, OwnCalls)]:
        calls.shut_down()
        calls.join()


def _abandon_all() -> None:
    for calls in list(_all):
        calls.abandon()


# not atexit, which comes after the end of the threads that a session needs; of these, the last registered runs first,
# and the hook of ThreadPoolExecutor is registered by its import
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_abandon_all)
