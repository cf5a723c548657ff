"""The proxy of a backend that runs in an allocation, without a pilot."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from rhapsody_mcp.backends.base import Ended, Event, Progressed, Returned, Running
from rhapsody_mcp.backends.compute.nodes.result_files import delete_files
from rhapsody_mcp.backends.pilot.allocation import Allocation
from rhapsody_mcp.backends.pilot.backend import PilotBackend
from rhapsody_mcp.backends.pilot.hosted import HostedBackend
from rhapsody_mcp.backends.pilot.messages import (
    AskOutput,
    BackendReady,
    Body,
    Cancel,
    Events,
    Numbered,
    OutputTold,
    PlannedBackend,
    Prioritize,
    Start,
    Submit,
)
from rhapsody_mcp.engine.network.multiplexer import Multiplexer
from rhapsody_mcp.model.live.output import OutputPart, OutputQuery
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import RankOutcome, canceled
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Stream, Value
from rhapsody_mcp.testing import ScriptedBackend
from tests.processes import wait_until
from tests.unit.dispatching import DONE, function

pytestmark = pytest.mark.anyio


class Granted:
    """An allocation whose pilot answers each start of a backend."""

    is_over, is_connected = False, True

    def __init__(self) -> None:
        self.users: dict[str, PilotBackend] = {}
        self.result_folders: set[str] = set()
        self.sent: list[Body] = []
        self.is_ended, self.answers = False, True

    async def acquire(self, user: PilotBackend) -> None:
        self.users[user.name] = user

    async def leave(self, user: PilotBackend) -> None:
        self.is_ended = True

    def send(self, body: Body) -> None:
        self.sent.append(body)
        if isinstance(body, Start) and self.answers:
            self.users[body.backend].receive(BackendReady(body.backend))

    notes_are_complete = True

    def end_if_unused(self) -> None:
        self.is_ended = self.is_ended or all(user.is_waiting for user in self.users.values())

    def node_of(self, path: str) -> None:
        return None

    async def reconnected(self, lost: object) -> bool:
        return False

    def hand_over(self) -> None: ...

    def detach(self) -> None: ...

    @property
    def submitted(self) -> list[str]:
        return [run.spec.uid for body in self.sent if isinstance(body, Submit) for run in body.task_runs]


def tell(backend: PilotBackend, event: Event) -> None:
    """What the pilot says of a first attempt; the acknowledgement is not waited for."""
    cast(Any, backend.receive(Events(backend.name, [event], [1]))).close()


async def test_progress_and_output_of_a_task_come_from_the_pilot() -> None:
    granted, events = Granted(), list[Event]()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    await backend.start()
    backend.submit([function("a")], events.append, cast(Any, None))
    assert await backend.read_output("a", OutputQuery()) is None, "it does not run yet"
    tell(backend, Progressed("a", Progress(1.0, 1, 2)))
    assert events == [Progressed("a", Progress(1.0, 1, 2))]
    reading = asyncio.create_task(backend.read_output("a", OutputQuery(rank=3)))
    await wait_until(lambda: isinstance(granted.sent[-1], AskOutput), 10)
    asked = granted.sent[-1]
    assert isinstance(asked, AskOutput) and (asked.uid, asked.query.rank) == ("a", 3)
    backend.receive(OutputTold(backend.name, asked.number, (OutputPart(0, b"x", 1), OutputPart())))
    assert await reading == (OutputPart(0, b"x", 1), OutputPart())
    granted.is_connected = False
    assert await backend.read_output("a", OutputQuery()) is None
    await backend.close()


async def test_a_pilot_tells_the_last_progress_alone_and_all_of_it_to_a_new_service(tmp_path: Path) -> None:
    sent: list[Body] = []
    is_connected = True

    async def connection() -> Multiplexer:
        raise NotImplementedError

    plan = PlannedBackend("local", {"num_workers": 1})
    hosted = HostedBackend(plan, sent.append, str(tmp_path), connection, lambda: is_connected)
    hosted._attempts["a"], hosted._live["a"] = 1, Running("a", 1.0)
    for step in range(3):
        hosted._report(Progressed("a", Progress(float(step), step)))
    await wait_until(lambda: bool(sent), 10)
    assert sent == [Events("local", [Progressed("a", Progress(2.0, 2))], [1])]
    sent.clear()
    is_connected = False
    hosted._report(Progressed("a", Progress(3.0, 3)))
    await wait_until(lambda: not hosted._untold, 10)
    assert not sent, "nobody is there who could be told"
    hosted.report_state()
    assert isinstance(sent[0], Events) and sent[0].events == [Running("a", 1.0), Progressed("a", Progress(3.0, 3))]


async def test_an_allocation_is_kept_for_a_task_that_an_earlier_service_had_sent() -> None:
    granted, events = Granted(), list[Event]()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    await backend.start()

    async def before_start(uids: Collection[str]) -> bool:
        return True

    backend.before_start = before_start
    tell(backend, Running("a", 1.0))
    backend.submit([function("a"), function("b")], events.append, cast(Any, None))
    await wait_until(lambda: granted.submitted == ["a", "b"], 10)  # the pilot knows that it has "a"
    tell(backend, Ended("b", canceled(Cause.CANCELED, "x")))
    assert [type(event) for event in events] == [Running, Ended] and not granted.is_ended
    tell(backend, Ended("a", canceled(Cause.CANCELED, "x")))
    assert [event.uid for event in events] == ["a", "b", "a"]
    await backend.close()


async def test_a_cancellation_after_the_hand_over_does_not_reach_the_pilot() -> None:
    granted, events = Granted(), list[Event]()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    await backend.start()
    backend.submit([function("a")], events.append, cast(Any, None))
    await wait_until(lambda: granted.submitted == ["a"], 10)
    backend.detach()
    backend.cancel(["a"])
    await backend.close()
    assert not [body for body in granted.sent if isinstance(body, Cancel)]
    assert [type(event) for event in events] == [Ended]


async def test_a_hand_over_does_not_wait_for_a_pilot_that_stops_an_engine() -> None:
    granted = Granted()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    await backend.start()
    rest = asyncio.create_task(backend.rest())
    await asyncio.sleep(0)
    backend.detach()
    await rest
    assert not granted.is_ended
    await backend.close()


async def test_what_an_earlier_pilot_had_started_does_not_run_again(tmp_path: Path) -> None:
    sent = list[Body]()

    async def connection() -> Multiplexer:
        raise AssertionError

    plan = PlannedBackend("local", {}, str(tmp_path))
    hosted = HostedBackend(plan, sent.append, str(tmp_path), connection, lambda: True, started_before={("noted", 1)})
    resumed = msgspec.structs.replace(function("resumed"), resumed=True)
    again = msgspec.structs.replace(function("noted"), attempt=2)
    hosted.receive(Submit("local", [function("noted"), resumed, function("new")]))
    hosted.receive(Submit("local", [again]))
    await wait_until(lambda: len(sent) > 0, 10)
    events = {(event.uid, attempt): event for body in cast(list[Events], sent) for event, attempt in told(body)}
    lost = {key for key, event in events.items() if isinstance(event, Ended) and event.outcome.cause is Cause.LOST}
    assert lost == {("noted", 1), ("resumed", 1)}
    assert {key for key, event in events.items() if isinstance(event, Returned)} == {("new", 1), ("noted", 2)}


async def test_priorities_reach_the_pilot_and_order_what_is_not_sent_yet(tmp_path: Path) -> None:
    granted, events, recorded = Granted(), list[Event](), asyncio.Event()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))

    async def before_start(uids: Collection[str]) -> bool:
        await recorded.wait()
        return True

    await backend.start()
    backend.submit([function("a")], events.append, cast(Any, None))
    await wait_until(lambda: granted.submitted == ["a"], 10)
    backend.before_start = before_start
    backend.submit([function("b")], events.append, cast(Any, None))
    await asyncio.sleep(0)
    backend.submit([function("c"), function("d")], events.append, cast(Any, None))
    backend.prioritize({"a": 2, "d": 3, "gone": 1})
    recorded.set()
    await wait_until(lambda: granted.submitted == ["a", "b", "d", "c"], 10)
    orders = [body for body in granted.sent if isinstance(body, Prioritize)]
    assert orders == [Prioritize(backend.name, {"a": 2})]
    backend.before_start = None
    await backend.close()


def told(body: Events) -> list[tuple[Event, int]]:
    return list(zip(body.events, body.attempts, strict=True))


async def test_what_a_pilot_says_of_a_task_comes_before_what_this_service_does(tmp_path: Path) -> None:
    granted, events = Granted(), list[Event]()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    await backend.start()
    tell(backend, Returned("a", "its pilot ended"))
    tell(backend, Ended("b", DONE))
    backend.submit([function("a"), function("b")], events.append, cast(Any, None))
    await wait_until(lambda: granted.submitted == ["a"], 10)
    assert events == [Ended("b", DONE)]
    await backend.close()


async def test_a_start_goes_on_with_the_pilot_that_replaces_another() -> None:
    granted = Granted()
    granted.answers = False
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    start = asyncio.create_task(backend.start())
    await wait_until(lambda: granted.sent == [Start(backend.name)], 10)
    granted.answers = True
    backend.lose("job 7 was run again", (), is_replaced=True)
    await start
    assert granted.sent == [Start(backend.name)] * 2
    await backend.close()


def test_of_the_files_of_a_result_those_of_this_node_are_deleted(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("value", "output", "elsewhere/value", "other")]
    (tmp_path / "elsewhere").mkdir()
    for file in files:
        file.touch()
    value, output, elsewhere = map(str, files[:3])
    values = [Value("json", "str", 1, file=path) for path in (value, elsewhere)]
    ranks = tuple(RankOutcome(number, value=of) for number, of in enumerate(values))
    delete_files(msgspec.structs.replace(DONE, stdout=Stream(file=output), ranks=ranks), str(tmp_path))
    assert [path for path in files if path.exists()] == files[2:]


async def test_the_trace_context_of_a_task_goes_with_it_to_the_pilot() -> None:
    granted, events = Granted(), list[Event]()
    backend = PilotBackend(ScriptedBackend(lambda *_: None), cast(Allocation, granted))
    await backend.start()
    variables = {"TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    backend.submit([msgspec.structs.replace(function("a"), variables=variables)], events.append, cast(Any, None))
    await wait_until(lambda: bool(granted.submitted), 10)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(Numbered(1, granted.sent[-1])), type=Numbered)
    assert isinstance(told.body, Submit) and told.body.task_runs[0].variables == variables
    await backend.close()
