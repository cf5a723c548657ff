"""Every backend keeps the contract of `backends.base.Backend`."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

from rhapsody_mcp.backends import (
    DragonExecutionBackendV3,
    DragonVllmInferenceBackend,
    EndpointInferenceBackend,
    LocalExecutionBackend,
)
from rhapsody_mcp.backends.base import Backend, BackendBase, Ended, Event, Kind, Running
from rhapsody_mcp.model.errors import BackendUnavailable
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Command, Completion, Layout, RankGroup, TaskRun, TaskSpec, Template
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import load
from rhapsody_mcp.testing import ScriptedBackend
from tests.backends.openai_stand_in import StandIn, serve

pytestmark = pytest.mark.anyio
WITHIN_S = 600  # every wait here is for an event; one that never comes fails the test
ONE_PROCESS = Layout("process", groups=(RankGroup(1, Template()),))
NATIVE = Layout("native")
ROOT = Call("module", b"math:sqrt", arguments=pickle.dumps(((9,), {})))


class Case(NamedTuple):
    """A backend, its short tasks, and one that goes on until it is canceled."""

    open: Callable[[], Any]
    short: Sequence[tuple[Any, Layout]]
    endless: tuple[Any, Layout]
    before_endless: Callable[[Any], object] = lambda backend: None
    """Called before a task that goes on is submitted."""
    runs_user_code: bool = False
    engine: str = ""
    """The kind of engine that it records; empty for none."""


def _answer(spec: TaskSpec, values: list[Any]) -> object:
    return "done"


@asynccontextmanager
async def scripted() -> AsyncIterator[Case]:
    works = ((ROOT, NATIVE), (Command("true"), ONE_PROCESS), (Completion(prompts=("hi",)), NATIVE))
    yield Case(lambda: ScriptedBackend(_answer), works, works[0], lambda backend: backend.may_finish.clear())


def compute(open_backend: Callable[..., Any], engine: str) -> Case:
    short = ((ROOT, NATIVE), (ROOT, ONE_PROCESS), (Command("true"), ONE_PROCESS))
    endless = (Command("sleep", ("100000",)), ONE_PROCESS)
    return Case(lambda: open_backend(num_workers=2), short, endless, runs_user_code=True, engine=engine)


@asynccontextmanager
async def local() -> AsyncIterator[Case]:
    yield compute(LocalExecutionBackend, "local")


@asynccontextmanager
async def dragon() -> AsyncIterator[Case]:
    yield compute(DragonExecutionBackendV3, "dragon")


@asynccontextmanager
async def endpoint() -> AsyncIterator[Case]:
    async with serve(StandIn()) as server:
        short = [(Completion(prompts=("hi",)), NATIVE), (Completion(prompts=("a", "b"), many=True), NATIVE)]
        yield Case(lambda: EndpointInferenceBackend(server.url), short, short[0], lambda _: server.gate.clear())


@asynccontextmanager
async def vllm() -> AsyncIterator[Case]:
    short = [(Completion(prompts=("hi",), max_tokens=2), NATIVE)]
    endless = (Completion(prompts=("hi",) * 20_000, many=True), NATIVE)
    yield Case(lambda: DragonVllmInferenceBackend(model="shipped", device="cpu"), short, endless, engine="vllm")


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


CASES = [
    pytest.param(scripted, id="scripted"),
    pytest.param(local, id="local"),
    pytest.param(dragon, id="dragon", marks=missing("dragon")),
    pytest.param(endpoint, id="endpoint"),
    pytest.param(vllm, id="vllm", marks=[pytest.mark.ci, missing("vllm")]),
]


@pytest.fixture(scope="module", params=CASES)
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    make: Callable[[], AbstractAsyncContextManager[Case]] = request.param
    async with make() as made:
        yield made


@pytest.fixture(scope="module")
async def backend(case: Case, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Backend]:
    opened, recorder = case.open(), Recorder()
    opened.book, opened.before_start = recorder, recorder.before_start
    opened.work_in(str(tmp_path_factory.mktemp("work")))
    await opened.start()
    yield opened
    await opened.close()


class Listener:
    """Keeps the events of tasks."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.setdefault(event.uid, []).append(event)
        self._changed.set()

    async def until(self, kind: type[Running] | type[Ended], *uids: str) -> None:
        with anyio.fail_after(WITHIN_S):
            while not all(any(isinstance(event, kind) for event in self.events.get(uid, ())) for uid in uids):
                await self._changed.wait()
                self._changed.clear()

    def outcome(self, uid: str) -> Outcome:
        """Of a task that has ended; its events are as the contract has them."""
        *before, last = self.events[uid]
        assert isinstance(last, Ended)
        assert len(before) <= 1
        assert all(isinstance(event, Running) for event in before)
        return last.outcome


class Recorder:
    """Records the engines, and the starts, of one backend."""

    def __init__(self) -> None:
        self.opened_kinds: dict[str, str] = {}
        self.launched_marks: list[str] = []
        self.closed_marks: list[str] = []
        self.starts: list[str] = []

    async def opened(self, mark: str, kind: str, folder: str) -> None:
        self.opened_kinds[mark] = kind

    def launched(self, mark: str, pid: int, started: int) -> None:
        self.launched_marks.append(mark)

    def closed(self, mark: str) -> None:
        self.closed_marks.append(mark)

    async def before_start(self, uids: Sequence[str]) -> bool:
        self.starts += uids
        return True


def task_run(uid: str, work: tuple[Any, Layout], folder: Path) -> TaskRun:
    return TaskRun(spec=TaskSpec(uid=uid, work=work[0], layout=work[1]), bindings={}, results_folder=str(folder))


async def test_a_backend_has_every_member_of_the_protocol(case: Case, backend: Backend) -> None:
    unstarted: Backend = case.open()
    for one in (backend, unstarted):
        assert isinstance(one, Backend)
        assert set(one.kinds) <= {"function", "executable", "prompt"}
        assert one.num_workers is None or one.num_workers >= 1
        assert isinstance(one.progress, str)
        assert isinstance(one.serves_shipped_model, bool)
        assert json.loads(json.dumps(one.describe()))["backend"] == one.name
    await unstarted.close()


async def test_a_task_runs_at_most_once_and_ends_once(case: Case, backend: Backend, tmp_path: Path) -> None:
    listener = Listener()
    runs = [task_run(f"task.{number}", work, tmp_path) for number, work in enumerate([*case.short, *case.short])]
    for run in runs:
        backend.check(run.spec)
    backend.submit(runs, listener, load)
    await listener.until(Ended, *(run.spec.uid for run in runs))
    for run in runs:
        outcome = listener.outcome(run.spec.uid)
        assert (outcome.state, outcome.cause, outcome.error) == (TaskState.DONE, None, "")
        assert outcome.started is not None
        assert outcome.started <= outcome.ended


async def test_a_started_backend_starts_no_second_time(case: Case, backend: Backend, tmp_path: Path) -> None:
    before = backend.describe()
    await backend.start()
    assert backend.describe() == before


async def test_a_cancel_ends_the_task_that_it_names_and_ignores_the_others(
    case: Case, backend: Backend, tmp_path: Path
) -> None:
    listener = Listener()
    backend.submit([task_run("short", case.short[0], tmp_path)], listener, load)
    await listener.until(Ended, "short")
    backend.cancel(["short", "unheard of"])
    case.before_endless(backend)
    backend.submit([task_run("endless", case.endless, tmp_path)], listener, load)
    await listener.until(Running, "endless")
    backend.cancel(["endless"])
    await listener.until(Ended, "endless")
    outcome = listener.outcome("endless")
    assert (outcome.state, outcome.cause, outcome.error) == (TaskState.CANCELED, Cause.CANCELED, "canceled on request")
    assert listener.outcome("short").state is TaskState.DONE


async def test_a_backend_that_was_never_started_closes(case: Case) -> None:
    backend = case.open()
    await backend.rest()
    await backend.close()
    with pytest.raises(BackendUnavailable):
        await backend.start()


async def test_its_life_is_recorded_and_its_end_ends_what_runs(case: Case, backend: Backend, tmp_path: Path) -> None:
    """The last test of a backend: it closes the backend."""
    listener, recorder = Listener(), backend.book
    assert isinstance(recorder, Recorder)
    recorder.starts.clear()
    with anyio.fail_after(WITHIN_S):
        await backend.rest()
        await backend.start()
        case.before_endless(backend)
        backend.submit([task_run("endless", case.endless, tmp_path)], listener, load)
        await listener.until(Running, "endless")
        await backend.close()
        await backend.close()
    assert listener.outcome("endless").state is TaskState.CANCELED
    assert recorder.starts == (["endless"] if case.runs_user_code else [])
    engines = [case.engine] * 2 if case.engine else []
    assert list(recorder.opened_kinds.values()) == engines
    assert recorder.launched_marks == recorder.closed_marks == list(recorder.opened_kinds)
    with pytest.raises(BackendUnavailable):
        await backend.start()


class _Least(BackendBase):
    """What a backend without an engine has to bring along."""

    name = "least"
    kinds: tuple[Kind, ...] = ("prompt",)

    async def start(self) -> None:
        return

    def submit(self, task_runs: Sequence[TaskRun], report: Callable[[Event], None], read: Any) -> None:
        return

    def cancel(self, uids: Any) -> None:
        return

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name}


def test_the_base_gives_a_backend_the_rest() -> None:
    backend: Backend = _Least()
    assert isinstance(backend, Backend)
    assert (backend.num_workers, backend.progress, backend.serves_shipped_model) == (None, "", False)
