"""The interface between a session and the backends that run its tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, Self, runtime_checkable

import msgspec

from rhapsody_mcp.model.errors import refuse_attribute
from rhapsody_mcp.model.live.output import OutputQuery, Printed
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.values import Reader

__all__ = [
    "OF_ASYNCFLOW",
    "RESTARTS",
    "Backend",
    "BackendBase",
    "BeforeStart",
    "Ended",
    "EngineBook",
    "Event",
    "Kind",
    "OnLoss",
    "Progressed",
    "Report",
    "Returned",
    "Running",
    "restart_delay_s",
]

Kind = Literal["function", "executable", "prompt"]


class Running(msgspec.Struct, frozen=True, tag="running", gc=False):
    """The task's user code has started, at this time (seconds since the epoch). `nodes` and, of a function, the number
    of its `worker` are there where they are told."""

    uid: str
    at: float
    nodes: tuple[str, ...] = ()
    worker: int | None = None


class Ended(msgspec.Struct, frozen=True, tag="ended", gc=False):
    """The task has reached a final state, and no process of it is left."""

    uid: str
    outcome: Outcome


class Returned(msgspec.Struct, frozen=True, tag="returned", gc=False):
    """The backend gives the task back: its engine has ended, and the task has not run and never will.

    `reason` is a sentence. The session may submit the task again, to the same backend too.
    """

    uid: str
    reason: str = ""


class Progressed(msgspec.Struct, frozen=True, tag="told", gc=False):
    """The running task has told how far it is; `progress` is all that it has told."""

    uid: str
    progress: Progress


Event = Running | Progressed | Ended | Returned
Report = Callable[[Event], None]


class EngineBook(Protocol):
    """Where a backend records the engines that it starts, so that what a crash leaves of them can be ended later.

    It is called in the event loop.
    """

    async def opened(self, mark: str, kind: str, folder: str) -> None:
        """Record an engine that is about to be started: its processes will carry `mark`, and its files are in `folder`.

        `kind` is the name of the backend in `BACKENDS`. Returns when the record is on the disk. Where this raises, the
        backend starts nothing.
        """

    def launched(self, mark: str, pid: int, started: int) -> None:
        """The keeper of the engine with this mark runs as process `pid`. `started` is the start time that the kernel
        gives this process, 0 where it is not known."""

    def closed(self, mark: str) -> None:
        """No process and no file of the engine with this mark is left."""


BeforeStart = Callable[[Sequence[str]], Coroutine[Any, Any, bool]]
"""Records that each of the tasks with these uids may start from now on. True once that is recorded; after False the
backend is about to be closed. It never raises."""


OnLoss = Callable[[str], None]
"""Called with the reason why a part of an engine is lost."""


@runtime_checkable
class Backend(Protocol):
    """Runs tasks. One object serves one session; every method is called in the session's event loop.

    `BackendBase` has a default for each member that a simple backend need not have.
    """

    name: str
    """The value of a task's `backend` that sends the task here. A session refuses two backends of one name."""

    book: EngineBook | None
    """Set before the first start, or None. A backend records in it each engine that it starts."""

    before_start: BeforeStart | None
    """Set before the first start, or None. A backend that runs user code awaits it, and starts a task only after it has
    given True for that task: so the recorder knows of every task that may have started."""

    on_loss: OnLoss
    """Set before the first start. A backend may call it when a part of its engine is lost, also without any task."""

    @property
    def kinds(self) -> Collection[Kind]:
        """The kinds of task that this backend runs."""

    @property
    def num_workers(self) -> int | None:
        """How many functions run at a time; None where the backend sets no bound."""

    @property
    def num_cores(self) -> int | None:
        """How many cores functions and processes share; None where that is not known, or where there are none."""

    @property
    def progress(self) -> str:
        """What the engine does now, in words, as in "starting"; may be empty."""

    abandons_start: bool
    """Whether a start is canceled once no task waits for it: it asks for nodes that others could use."""

    @property
    def serves_shipped_model(self) -> bool:
        """Whether prompts go to the model that is shipped with this package, which is for trials only."""

    def work_in(self, folder: str) -> None:
        """Set the working directory of tasks; an empty text stands for the working directory of this process.

        Raises InvalidRequest where the backend has started with another working directory. A backend whose tasks have
        no working directory does nothing.
        """

    def keep_in(self, folder: Path) -> None:
        """Keep in this folder what another process needs to go on with the session. Called before the first start."""

    def detach(self) -> None:
        """Let the next `close` leave running what can run without this process: another process goes on with the
        session."""

    def check(self, spec: TaskSpec) -> None:
        """Raise InvalidTask where the task is known to be wrong before its submission. No I/O, no waiting."""

    async def start(self) -> None:
        """Get ready to run tasks. A second call waits for the first and then does nothing.

        Raises InvalidSettings where starting again would fail again, BackendUnavailable otherwise. Nothing is
        left running after a failed or cancelled start, and it may be tried again.
        """

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        """Take these tasks; the backend has started. Never blocks and never raises for a task.

        Raises BackendUnavailable, with nothing taken, where the engine has died; `start` makes a new one.
        For each task `report` is called from the event loop with at most one Running, any number of Progressed, and
        then exactly one Ended, also when the backend is closed. Where the engine dies, a task that had started, or may
        have, ends with cause lost; one that certainly never did, and never will, may get one Returned instead. `read`
        opens bound values here, outside the processes that run user code: it may refuse one with InvalidTask.
        """

    def cancel(self, uids: Collection[str]) -> None:
        """Ask for these tasks to end CANCELED, with their process trees. Unknown and ended uids are ignored.

        A task that ends by itself before the request reaches it keeps its own outcome.
        """

    async def read_output(self, uid: str, query: OutputQuery) -> Printed | None:
        """A piece of what a running task has printed so far, within a second of the time when it was flushed.

        None where the task does not run here now, or prints nothing that could be read. Never raises, and waits for
        some seconds at most.
        """

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        """Give tasks that wait here, by uid, these priorities; the higher ones start first. Other uids are ignored."""

    def drain(self, reason: str) -> None:
        """Start no further task, and return those that have not started, with this reason; the others go on. The
        backend is about to be closed. A backend may let all its tasks go on."""

    async def rest(self) -> None:
        """End the engine because no task needs it now; `start` makes a new one. Called while the backend has no task,
        also after a start that failed, to give back what it holds, such as nodes.

        Returns when no process of the engine is left. Nothing happens where no engine runs.
        """

    async def close(self) -> None:
        """End every task and process, then return. A second call does nothing. Survives cancellation of its
        caller: nothing is left running in either case. A closed backend does not start."""

    def describe(self) -> dict[str, Any]:
        """Facts about this backend as plain JSON data; `backend` is its name. No secrets, no waiting."""


RESTARTS = 5
"""How many restarts of an engine may fail in a row before its tasks are given up."""


OF_ASYNCFLOW = {"attached_to": "a flow takes AsyncFlowBackend(session) of rhapsody_mcp.integrations"}
"""What a flow of AsyncFlow looks for in a backend or a session that it is given."""


def restart_delay_s(attempt: int) -> float:
    """The seconds to wait before restart number `attempt`, which counts from 1: 1, 2, 4, 8, 16."""
    return 2.0 ** (attempt - 1)


class BackendBase:
    """Defaults for a backend without an engine. `async with backend` and `await backend` start the backend.

    A subclass adds `name`, `kinds`, `start`, `submit`, `cancel`, `describe`, and `_close`, which is called once.
    """

    book: EngineBook | None = None
    before_start: BeforeStart | None = None
    on_loss: OnLoss = staticmethod(lambda reason: None)
    num_workers: int | None = None
    num_cores: int | None = None
    abandons_start = False
    was_awaited = False
    """Whether a program has started the backend, in an event loop that the program chose."""
    _closing: asyncio.Task[None] | None = None

    @property
    def progress(self) -> str:
        return ""

    @property
    def serves_shipped_model(self) -> bool:
        return False

    def work_in(self, folder: str) -> None:
        """Do nothing: tasks have no working directory."""

    def keep_in(self, folder: Path) -> None:
        """Keep nothing: the backend ends with this process."""

    def detach(self) -> None:
        """Do nothing: the backend ends with this process."""

    def check(self, spec: TaskSpec) -> None:
        """Accept every task."""

    async def start(self) -> None:
        raise NotImplementedError

    async def read_output(self, uid: str, query: OutputQuery) -> Printed | None:
        """Nothing: tasks print nothing."""
        return None

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        """Do nothing: no task waits here."""

    def drain(self, reason: str) -> None:
        """Let all tasks go on."""

    async def rest(self) -> None:
        """Do nothing: there is no engine."""

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> NoReturn:
        refuse_attribute(self, name, OF_ASYNCFLOW)

    async def __aenter__(self) -> Self:
        return await self.initialize()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.initialize().__await__()

    async def initialize(self) -> Self:
        """Start the backend; the same as `await backend`."""
        self.was_awaited = True
        await self.start()
        return self
