"""The executor: a session in the place of a `concurrent.futures.ProcessPoolExecutor`."""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from copy import copy
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from rhapsody_mcp.api.calls import Call, Calls, OwnCalls
from rhapsody_mcp.api.session import Session
from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.runtime.tasks.task import COMMON_FIELDS

__all__ = ["SessionExecutor"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_OPTIONS = COMMON_FIELDS - {"uid"} | {"outputs"}
_LONG_LIVED = (
    "a worker serves calls of many functions, and starts anew where one has crashed. What is prepared once for a "
    "worker belongs into a function behind functools.cache, in a module that the calls import; variables and lines of "
    'bash into the backend, as in LocalExecutionBackend(environment={"variables": {...}, "setup": [...]}).'
)
_ELSEWHERE = {
    "max_workers": "say it to the backend, as in LocalExecutionBackend(num_workers=4).",
    "initializer": _LONG_LIVED,
    "initargs": _LONG_LIVED,
    "mp_context": "a backend starts its processes in its own way, with nothing of this process.",
    "max_tasks_per_child": "a call in a process of its own is executor.options(cores=1).submit(...).",
    "opens_results": "an executor opens the results of its calls.",
}
"""Arguments of other executors, and of sessions, and what stands in their place."""


class SessionExecutor(Executor):
    """A standard executor whose calls are tasks of a session: functions in workers, on nodes and on GPUs.

    `SessionExecutor(backend, ...)` has a session of its own, in a thread of its own, which ends with the executor; the
    keyword arguments are those of `Session`. `SessionExecutor.of(session)` is that of an open session. Where a process
    ends below a call, the future raises a TaskFailed that is also a BrokenExecutor, and the executor goes on.
    """

    def __init__(self, *backends: Backend, **session: Any) -> None:
        for name in session.keys() & _ELSEWHERE.keys():
            raise InvalidRequest(f"an executor takes no {name}=: {_ELSEWHERE[name]}")
        _check(backends)
        self._take(OwnCalls(Session(backends, **session)))
        self._end = weakref.finalize(self, self._calls.shut_down)
        self._end.atexit = False

    @classmethod
    def of(cls, session: Session) -> Self:
        """The executor of an open session, made in its event loop and used from that loop or from any thread.

        It leaves the session open. In the thread of the event loop `shutdown` does not wait. Raises InvalidRequest
        elsewhere.
        """
        executor = cls.__new__(cls)
        executor._take(Calls(session, _running_loop()))
        return executor

    def _take(self, calls: Calls) -> None:
        self._calls, self._options = calls, dict[str, Any]()

    _origin: SessionExecutor | None = None

    @property
    def _max_workers(self) -> int:
        """How many functions run at a time, under the name by which Dask and others ask an executor."""
        return sum(backend.num_workers or 0 for backend in self.session.backends) or 1

    @property
    def session(self) -> Session:
        """The session, which lives in its event loop; after `shutdown` any thread may ask it, as for `report`."""
        return self._calls.session

    def options(self, **options: Any) -> Self:
        """The same executor, with options for what is submitted through this object.

        Options are the keys of `task_backend_specific_kwargs`, such as cores, gpus, memory_gb, timeout, python and
        packages, and the fields of a task, such as name, backend, retries and priority. Raises InvalidTask.
        """
        other = copy(self)
        other._origin = self  # whose end is that of the calls
        fields = {name: value for name, value in options.items() if name in _OPTIONS}
        kwargs = {name: value for name, value in options.items() if name not in _OPTIONS}
        kwargs = self._options.get("task_backend_specific_kwargs", {}) | kwargs
        other._options = self._options | fields | ({"task_backend_specific_kwargs": kwargs} if kwargs else {})
        Call(self._calls, abs, other._options)
        return other

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        return self._calls.submit(Call(self._calls, fn, self._options, args=args, kwargs=kwargs))

    def map(
        self,
        fn: Callable[..., _T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[_T]:
        """As in Python 3.14: of `buffersize` calls, or chunks of calls, the next is submitted as a result is taken."""
        for name, value in (("chunksize", chunksize), ("buffersize", buffersize)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1.")
        calls = zip(*iterables, strict=False)
        if chunksize == 1:
            return self._results(fn, calls, timeout, buffersize)
        chunks = ((chunk,) for chunk in iter(lambda: list(itertools.islice(calls, chunksize)), []))
        return _flat(self._results(_one_by_one(fn), chunks, timeout, buffersize))

    def _results(
        self, fn: Callable[..., _T], calls: Iterator[tuple[Any, ...]], timeout: float | None, buffersize: int | None
    ) -> Iterator[_T]:
        """Submits the first calls at once, and not with the first result."""
        end = None if timeout is None else time.monotonic() + timeout
        futures = deque(self.submit(fn, *args) for args in itertools.islice(calls, buffersize))

        def results() -> Iterator[_T]:
            more = len(futures) == buffersize
            try:
                while futures:
                    if more and (more := (args := next(calls, None)) is not None):
                        futures.append(self.submit(fn, *args))
                    yield _result(futures.popleft(), end)
            finally:
                for future in futures:
                    future.cancel()

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those of every object of `options` end too."""
        self._calls.shut_down(cancel=cancel_futures)
        if wait:
            self._calls.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down; after Ctrl-C, cancel also the calls that run, which hear nothing of the signal themselves."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._calls.shut_down(stop=True)
        self.shutdown()


def _check(backends: Sequence[Backend]) -> None:
    if not backends or not all(isinstance(backend, Backend) for backend in backends):
        raise InvalidRequest(
            "an executor takes a backend, or several one after the other, as in "
            "SessionExecutor(LocalExecutionBackend(num_workers=4)); no list."
        )
    for backend in backends:
        if getattr(backend, "was_awaited", False):
            raise InvalidRequest(
                f"backend {backend.name!r} has been awaited and belongs to the event loop of that await; an executor "
                "has one of its own: leave out the await, or open a session there and use SessionExecutor.of(session)."
            )


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise InvalidRequest(
            "SessionExecutor.of(session) is called in the event loop of the session, as in its async with; a program "
            "without one has SessionExecutor(backend)."
        ) from None


def _one_by_one(fn: Callable[..., _T]) -> Callable[[list[tuple[Any, ...]]], list[_T]]:
    # a function within a function is sent by value, so that its worker need not import this module
    return lambda chunk: [fn(*args) for args in chunk]


def _flat(chunks: Iterator[list[_T]]) -> Iterator[_T]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def _result(future: Future[_T], end: float | None) -> _T:
    try:
        return future.result(None if end is None else end - time.monotonic())
    finally:
        future.cancel()
        del future
