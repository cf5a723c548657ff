"""What a managed backend does where its engine dies, does not start, or has no task. The clock is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends.base import Ended, OnLoss, Progressed, Running
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.specs import Call, Layout, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import load
from rhapsody_mcp.runtime.session.managed_backend import EngineNotice, ManagedBackend
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


class Clock:
    """Calls what is due when it is told that time has passed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, call: Callable[[], object]) -> Timer:
        self.timers.append(Timer(self, self.now + delay_s, call))
        return self.timers[-1]

    async def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.due <= self.now]:
            timer.cancel()
            timer.call()
        await all_is_still()


class Timer:
    def __init__(self, clock: Clock, due: float, call: Callable[[], object]) -> None:
        self.clock, self.due, self.call = clock, due, call

    def cancel(self) -> None:
        if self in self.clock.timers:
            self.clock.timers.remove(self)


async def all_is_still() -> None:
    """Everything that can happen without time or outside help has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


class Watched:
    """A managed scripted backend, and what it reports."""

    def __init__(self, idle_s: float | None = None) -> None:
        self.backend, self.clock = ScriptedBackend(answer), Clock()
        self.notices: list[EngineNotice] = []
        self.ended: dict[str, Ended] = {}
        self.began: list[str] = []
        self.needed = False
        self.managed = ManagedBackend(
            self.backend,
            self.handle,
            load,
            notify=self.notices.append,
            is_needed=lambda: self.needed,
            idle_s=idle_s,
            call_later=self.clock.call_later,
        )

    def handle(self, event: Running | Progressed | Ended) -> None:
        if isinstance(event, Running):
            self.began.append(event.uid)
            return
        assert isinstance(event, Ended)
        assert event.uid not in self.ended, "a task ends once"
        self.ended[event.uid] = event

    async def take(self, *uids: str) -> None:
        self.managed.submit([order(uid) for uid in uids])
        await all_is_still()

    async def die(self) -> None:
        self.backend.die("the engine was killed")
        await all_is_still()

    @property
    def outcomes(self) -> dict[str, tuple[str, Cause | None]]:
        return {uid: (event.outcome.state.value, event.outcome.cause) for uid, event in self.ended.items()}


@pytest.fixture
async def watch() -> AsyncIterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(idle_s: float | None = None) -> Watched:
        made.append(Watched(idle_s))
        return made[-1]

    yield make
    for watched in made:
        await watched.managed.close()


def order(uid: str) -> TaskRun:
    return TaskRun(
        spec=TaskSpec(uid=uid, work=Call("module", b"a:b"), layout=Layout("native")), bindings={}, results_folder="/"
    )


def answer(spec: TaskSpec, values: list[Any]) -> str:
    return spec.uid


DONE, LOST = ("DONE", None), ("FAILED", Cause.LOST)


async def test_what_had_started_is_lost_and_the_rest_runs_on_the_next_engine(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.backend.may_finish.clear()
    await watched.take("started")
    watched.backend.may_start.clear()
    await watched.take("first", "second")
    await watched.die()
    assert watched.outcomes == {"started": LOST}
    assert watched.managed.progress == "starting again (1 of 5) after: the engine was killed"
    watched.backend.may_start.set()
    watched.backend.may_finish.set()
    await watched.clock.pass_by(1.0)
    assert watched.outcomes == {"started": LOST, "first": DONE, "second": DONE}
    assert watched.began == ["started", "first", "second"]
    assert watched.managed.progress == ""
    assert [notice.text for notice in watched.notices] == [
        "backend 'scripted' lost its engine: the engine was killed",
        "backend 'scripted' runs again, at attempt 1 of 5",
    ]


async def test_an_engine_that_dies_again_and_again_is_started_later_and_later_and_then_no_more(
    watch: Callable[..., Watched],
) -> None:
    watched = watch()
    watched.backend.may_start.clear()
    await watched.take("waits")
    for number, delay_s in enumerate([1, 2, 4, 8, 16], 1):
        await watched.die()
        assert f"({number} of 5)" in watched.managed.progress
        await watched.clock.pass_by(delay_s - 0.5)
        assert watched.backend.starts == number
        await watched.clock.pass_by(0.5)
        assert watched.backend.starts == number + 1
    assert not watched.ended
    await watched.die()
    assert watched.outcomes == {"waits": LOST}
    told = watched.ended["waits"].outcome.error
    assert "started again 5 times" in told and "the engine was killed" in told
    watched.backend.may_start.set()
    await watched.take("next")
    assert watched.outcomes["next"] == DONE
    assert watched.backend.starts == 7


async def test_a_task_that_ends_shows_that_the_engine_is_well(watch: Callable[..., Watched]) -> None:
    watched = watch()
    for number in range(8):
        watched.backend.may_start.clear()
        await watched.take(f"task {number}")
        await watched.die()
        assert "(1 of 5)" in watched.managed.progress
        watched.backend.may_start.set()
        await watched.clock.pass_by(1.0)
        assert watched.outcomes[f"task {number}"] == DONE


async def test_a_task_that_kills_every_engine_does_not_show_that(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.backend.may_finish.clear()
    for number in range(3):
        await watched.take(f"deadly {number}")
        await watched.clock.pass_by(60.0)
        await watched.die()
    await watched.take("next")
    assert "(3 of 5)" in watched.managed.progress


async def test_an_engine_that_died_without_tasks_is_started_for_the_next(watch: Callable[..., Watched]) -> None:
    watched = watch()
    await watched.take("before")
    await watched.die()
    await watched.take("after")
    await watched.clock.pass_by(1.0)
    assert watched.outcomes == {"before": DONE, "after": DONE}


async def test_starts_that_fail_after_a_death_are_repeated_and_counted(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.backend.may_start.clear()
    await watched.take("waits")
    watched.backend.start_error = BackendUnavailable("no room")
    await watched.die()
    await watched.clock.pass_by(1.0)
    assert watched.managed.progress == "starting again (2 of 5) after: no room"
    watched.backend.start_error = None
    watched.backend.may_start.set()
    await watched.clock.pass_by(2.0)
    assert watched.outcomes == {"waits": DONE}


async def test_what_is_withdrawn_while_the_engine_starts_again_is_not_run_and_starts_nothing(
    watch: Callable[..., Watched],
) -> None:
    watched = watch()
    watched.backend.may_start.clear()
    await watched.take("first", "second")
    await watched.die()
    assert watched.managed.withdraw({"first", "second", "other"}) == {"first", "second"}
    await watched.clock.pass_by(60.0)
    assert watched.backend.starts == 1
    assert not watched.ended


async def test_closing_ends_the_wait_for_the_next_start(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.backend.may_start.clear()
    await watched.take("waits")
    await watched.die()
    await watched.managed.close()
    assert watched.clock.timers == []
    assert watched.backend.closed


async def test_what_a_refusal_sets_free_gets_a_start_of_its_own(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.backend.start_error = BackendUnavailable("not now")
    real = watched.handle

    def handle(event: Running | Progressed | Ended) -> None:
        real(event)
        if event.uid == "first":
            watched.backend.start_error = None
            watched.managed.submit([order("second")])

    watched.managed._report = handle
    await watched.take("first")
    assert watched.outcomes == {"first": LOST, "second": DONE}


# --- resting


async def test_what_a_start_that_failed_holds_is_given_back(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.backend.start_error = InvalidSettings("wrong network")
    await watched.take("one")
    assert watched.outcomes == {"one": ("FAILED", Cause.INVALID)}
    assert watched.backend.rests == 1


async def test_an_engine_without_tasks_rests_and_starts_again_on_need(watch: Callable[..., Watched]) -> None:
    watched = watch(idle_s=900.0)
    await watched.take("first")
    await watched.clock.pass_by(899.0)
    assert watched.backend.rests == 0
    await watched.clock.pass_by(1.0)
    assert watched.backend.rests == 1
    await watched.clock.pass_by(9000.0)
    assert (watched.backend.starts, watched.backend.rests) == (1, 1)
    await watched.take("second")
    assert watched.outcomes == {"first": DONE, "second": DONE}
    assert watched.backend.starts == 2
    assert "had no task for 900 s" in watched.notices[-1].text


async def test_tasks_that_run_or_are_still_to_come_keep_an_engine_awake(watch: Callable[..., Watched]) -> None:
    watched = watch(idle_s=900.0)
    watched.backend.may_finish.clear()
    await watched.take("long")
    await watched.clock.pass_by(9000.0)
    watched.needed = True
    watched.backend.may_finish.set()
    await all_is_still()
    await watched.clock.pass_by(900.0)
    assert (watched.outcomes, watched.backend.rests) == ({"long": DONE}, 0)
    watched.needed = False
    await watched.clock.pass_by(900.0)
    assert watched.backend.rests == 1


async def test_what_comes_while_an_engine_stops_to_rest_waits_for_that_and_runs(watch: Callable[..., Watched]) -> None:
    watched = watch(idle_s=900.0)
    stopped = asyncio.Event()

    class Slow(ScriptedBackend):
        async def rest(self) -> None:
            await stopped.wait()
            await super().rest()

        async def start(self) -> None:
            assert self.rests == self.starts, "it has stopped before it starts"
            await super().start()

    watched.backend.__class__ = Slow
    await watched.take("first")
    await watched.clock.pass_by(900.0)
    await watched.take("second")
    assert watched.outcomes == {"first": DONE}
    stopped.set()
    await all_is_still()
    assert watched.outcomes == {"first": DONE, "second": DONE}


# --- through a session


async def test_a_session_tells_of_its_engines_and_does_not_count_a_return_as_an_attempt() -> None:
    backend = ScriptedBackend(answer)
    task = ComputeTask(executable="true")
    async with Session([backend]) as session:
        backend.may_start.clear()
        await session.submit_tasks([task])
        await all_is_still()
        backend.die("the engine was killed")
        await all_is_still()
        assert (task.state, task.attempts) == (TaskState.QUEUED, 1)
        assert session.engines == {"scripted": "starting again (1 of 5) after: the engine was killed"}
        assert [notice.text for notice in session.notices] == [
            "backend 'scripted' lost its engine: the engine was killed"
        ]
        backend.may_start.set()
        await session.wait_tasks([task], timeout=600)  # its own clock, one second
    assert (task.state, task.attempts) == (TaskState.DONE, 1)


class Telling(ScriptedBackend):
    """Says at once that it lost its engine."""

    on_loss: OnLoss = staticmethod(lambda reason: None)


async def test_an_engine_that_ends_while_it_has_nothing_to_do_leaves_a_note_and_one_alone() -> None:
    backend, notices, ended = Telling(answer), list[EngineNotice](), list[Running | Progressed | Ended]()
    managed = ManagedBackend(backend, ended.append, load, notify=notices.append, call_later=Clock().call_later)
    managed.submit([order("a")])
    await all_is_still()
    backend.on_loss("signal 9 ended it")
    backend.die("signal 9 ended it")
    assert [notice.text for notice in notices] == ["backend 'scripted' lost its engine: signal 9 ended it"]
    managed.submit([order("b")])
    await all_is_still()
    assert len(notices) == 1
    await managed.close()


async def test_a_start_that_asks_for_nodes_is_given_up_once_no_task_waits_for_it(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch()

    async def pending() -> None:
        watched.backend.starts += 1
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(watched.backend, "start", pending)
        for abandons, rests in ((False, 0), (True, 1)):
            patch.setattr(watched.backend, "abandons_start", abandons)
            await watched.take("canceled")
            assert watched.managed.withdraw({"canceled"}) == {"canceled"}
            await watched.clock.pass_by(9.5)
            await watched.take("corrected")
            await watched.clock.pass_by(0.5)
            assert watched.backend.rests == 0
            watched.needed = True
            watched.managed.withdraw({"corrected"})
            await watched.clock.pass_by(10)
            assert watched.backend.rests == 0
            watched.needed = False
            watched.managed.withdraw({"corrected"})
            await watched.take("again")
            watched.managed.withdraw({"again"})
            await watched.clock.pass_by(10)
            assert (watched.backend.starts, watched.backend.rests) == (1, rests)
    await watched.take("next")
    assert watched.outcomes == {"next": DONE}
    assert watched.notices == []
