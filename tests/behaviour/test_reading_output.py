"""What tasks print is read whole and told truly: over attempts, at the moment of an end, and of many tasks."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from rhapsody_mcp.backends.base import Progressed
from rhapsody_mcp.model.live.output import OutputQuery, Printed
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Stream
from rhapsody_mcp.runtime.tasks import leaves
from rhapsody_mcp.toolsets.output.feed import OutputFeed
from rhapsody_mcp.toolsets.output.follow import follow
from rhapsody_mcp.toolsets.replies.base import REPLY_BYTES, size_of
from rhapsody_mcp.toolsets.waiting.until import Condition, Until
from tests.agents import Agent, open_agent
from tests.behaviour.test_resources import AT_ONCE, Ears, subscribed
from tests.behaviour.test_watching import SESSION, WatchedBackend

pytestmark = pytest.mark.anyio


class Printing(WatchedBackend):
    """Its tasks end with `ended_with` for their output. While `may_answer` is clear, a look waits; a task that ends
    meanwhile is not found then."""

    def __init__(self, *, failures: int = 0) -> None:
        super().__init__()
        self.may_finish.clear()
        self.may_answer, self.is_asked = anyio.Event(), anyio.Event()
        self.may_answer.set()
        self.ended_with, self.failures, self.looks = b"", failures, 0
        self.script = self._end

    def _end(self, *_: object) -> Outcome:
        if self.failures:
            self.failures -= 1
            raise ValueError("by chance")
        text = self.ended_with.decode()
        now = time.time()
        return Outcome(state=TaskState.DONE, started=now, ended=now, stdout=Stream(text, size=len(self.ended_with)))

    async def read_output(self, uid: str, query: OutputQuery) -> Printed | None:
        self.looks += 1
        self.is_asked.set()
        await self.may_answer.wait()
        return await super().read_output(uid, query) if uid in self._running else None

    def hold_answers(self) -> None:
        self.may_answer, self.is_asked = anyio.Event(), anyio.Event()

    def end_attempt(self) -> None:
        """End what runs, but not what starts then."""
        self.may_finish.set()
        self.may_finish.clear()


@asynccontextmanager
async def running(backend: Printing, attempt: int = 1, **more: Any) -> AsyncIterator[Agent]:
    async with open_agent(backend=backend, settings=AT_ONCE) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "train", "executable": "/bin/train", **more}])
        await attempts(agent, attempt)
        yield agent
        backend.may_answer.set()
        backend.may_finish.set()


async def attempts(agent: Agent, count: int) -> None:
    """Wait until the attempt with this number runs."""
    tasks = leaves([agent.sessions.get("session-1").task("train")])
    with anyio.fail_after(60):
        while not all(task.attempts == count and task.state is TaskState.RUNNING for task in tasks):
            await anyio.lowlevel.checkpoint()


TWICE = {"retries": 1, "retry_delay_s": 0}


def until(text: str) -> dict[str, Any]:
    return {**SESSION, "until": {"task": "train", "text": text}, "timeout_s": 30}


async def test_a_text_that_is_printed_at_the_very_end_is_found() -> None:
    backend = Printing()
    async with running(backend) as agent, anyio.create_task_group() as group:

        async def wait() -> None:
            waited = await agent.call("wait_tasks", **until("READY"))
            assert waited["until"] == {"met": True, "text": "train DONE printed: ready"}

        backend.hold_answers()
        group.start_soon(wait)
        await backend.is_asked.wait()
        backend.ended_with = b"so\nready\n"
        backend.end_attempt()
        await agent.sessions.get("session-1").task("train").future
        backend.may_answer.set()


async def test_a_text_at_the_beginning_of_a_later_attempt_is_found_while_it_runs() -> None:
    backend = Printing(failures=1)
    backend.printed = b"long " * 1000
    async with running(backend, **TWICE) as agent, anyio.create_task_group() as group:

        async def wait() -> None:
            waited = await agent.call("wait_tasks", **until("ready"))
            assert waited["until"] == {"met": True, "text": "train RUNNING printed: ready"}

        group.start_soon(wait)
        while backend.looks < 2:
            await anyio.lowlevel.checkpoint()
        backend.printed = b"ready\nsteady\n"
        backend.end_attempt()


async def test_a_later_attempt_is_followed_from_its_first_byte_on() -> None:
    backend = Printing(failures=1)
    backend.printed = b"first attempt\nno end of line"
    async with running(backend, **TWICE) as agent:
        opened = agent.sessions.get("session-1")
        lines = follow(opened.session, opened.task("train"), None, until_end=True)
        with anyio.fail_after(60):
            assert await anext(lines) == ("stdout", "first attempt\n")
            backend.printed = b"second\n"
            backend.end_attempt()
            await attempts(agent, 2)
            assert [await anext(lines), await anext(lines)] == [("stdout", "no end of line\n"), ("stdout", "second\n")]
            backend.ended_with = b"second\nlast"
            backend.end_attempt()
            assert [line async for line in lines] == [("stdout", "last")]


async def test_an_output_that_begins_anew_is_followed_from_its_first_byte_on() -> None:
    backend = Printing()
    backend.printed = b"a start that hangs\n"
    async with running(backend) as agent:
        opened = agent.sessions.get("session-1")
        lines = follow(opened.session, opened.task("train"), None, until_end=True)
        with anyio.fail_after(60):
            assert await anext(lines) == ("stdout", "a start that hangs\n")
            backend.printed = b"again\n"
            assert await anext(lines) == ("stdout", "again\n")


async def test_an_output_that_is_handed_over_before_the_end_is_told_is_not_given_again() -> None:
    backend = Printing()
    backend.printed = b"some\n"
    async with running(backend) as agent:
        opened = agent.sessions.get("session-1")
        lines = follow(opened.session, opened.task("train"), None, until_end=True)
        with anyio.fail_after(60):
            assert await anext(lines) == ("stdout", "some\n")
            backend.printed, looks = b"", backend.looks

            async def end() -> None:
                while backend.looks == looks:
                    await anyio.lowlevel.checkpoint()
                backend.ended_with = b"some\nmore\n"
                backend.end_attempt()

            async with anyio.create_task_group() as group:
                group.start_soon(end)
                assert [line async for line in lines] == [("stdout", "more\n")]


@pytest.mark.parametrize(
    ("text", "met"), [("loss | 0.5", False), ("a || b", True), ("| b", True), ("|", True), ("epoch 3", False)]
)
async def test_a_text_means_the_same_before_and_after_the_end(text: str, met: bool) -> None:
    backend = Printing()
    backend.printed = backend.ended_with = b"loss 0.5\na || b\nepoch3\n"
    async with running(backend) as agent:
        waited = await agent.call("wait_tasks", **{**until(text), "timeout_s": 0})
        assert waited["until"]["met"] is met
        backend.end_attempt()
        assert (await agent.call("wait_tasks", **until(text)))["until"]["met"] is met


async def test_of_a_long_line_what_is_around_the_text_is_told() -> None:
    backend = Printing()
    backend.printed = b"before\n" + b"x" * 500_000 + "\N{LATIN SMALL LETTER SHARP S} Needle ".encode() + b"y" * 500_000
    async with running(backend) as agent:
        told = (await agent.call("wait_tasks", **until("ss needle")))["until"]["text"]
        assert "x\N{LATIN SMALL LETTER SHARP S} Needle y" in told and len(told) < 350
        assert told.startswith("train RUNNING printed: ... x") and told.endswith("y ...")


async def test_a_wait_does_not_outlast_its_time_where_hosts_do_not_answer() -> None:
    backend = Printing()
    async with running(backend, ranks=64) as agent:
        backend.hold_answers()
        took = []
        for _ in range(3):  # another program may hold one of them up
            before = time.monotonic()
            waited = await agent.call("wait_tasks", **{**until("ready"), "timeout_s": 0.2})
            took.append(time.monotonic() - before)
            assert not waited["until"]["met"] and "not yet" in waited["until"]["text"]
        assert min(took) < 1.2


async def test_a_task_that_ends_while_its_output_is_read_is_shown_with_its_end() -> None:
    backend = Printing()
    async with running(backend) as agent, anyio.create_task_group() as group:

        async def look() -> None:
            shown = await agent.call("get_result", **SESSION, task="train", output="tail")
            assert (shown["state"], shown["stdout"]) == ("DONE", "so\n")
            assert "no result yet" not in agent.texts[-1]

        backend.hold_answers()
        group.start_soon(look)
        await backend.is_asked.wait()
        backend.ended_with = b"so\n"
        backend.end_attempt()
        await agent.sessions.get("session-1").task("train").future
        backend.may_answer.set()


async def test_of_many_tasks_a_line_says_how_many_are_shown() -> None:
    backend = Printing()
    backend.printed = b"0123456789\n" * 1000
    async with running(backend, for_each=20) as agent:
        shown = await agent.call("get_result", **SESSION, task="train", output="tail")
        assert shown["stdout"].endswith("\n[16 of 20 shown]\n") and shown["stdout_bytes"] == 16 * 11_000
        assert f"of {16 * 11_000} bytes so far ---" in agent.texts[-1]
        head = await agent.call("get_result", **SESSION, task="train", output="head")
        assert head["stdout"].startswith("[16 of 20 shown]\ntrain[0] 0123456789\n")


async def test_labels_are_no_output() -> None:
    backend = Printing()
    backend.printed = b"0\n" * 5_000
    async with running(backend, for_each=2) as agent:
        shown = await agent.call("get_result", **SESSION, task="train", output="tail")
        told = re.search(r"last (\d+) of 20000 bytes so far", agent.texts[-1])
        assert told is not None and abs(int(told[1]) - 2 * len(shown["stdout"].splitlines())) <= 2
        backend.printed = b"0\n" * 10
        await agent.call("get_result", **SESSION, task="train", output="tail")
        assert "task, 40 bytes so far" in agent.texts[-1]


async def test_a_subscriber_hears_that_a_shorter_later_attempt_grows() -> None:
    backend, ears = Printing(failures=1), Ears()
    log = "rhapsody://sessions/session-1/tasks/train/stdout"
    async with open_agent("auto", backend, AT_ONCE, message_handler=ears) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "train", "executable": "/bin/train", **TWICE}])
        await attempts(agent, 1)
        with anyio.fail_after(60):
            async with subscribed(agent.client, log):
                backend.printed = b"long " * 1000
                await ears.until(log)
                backend.printed = b""
                backend.end_attempt()
                await attempts(agent, 2)
                ears.heard.clear()
                backend.printed = b"short\n"
                await ears.until(log)
        backend.may_finish.set()
    ears.close()


async def test_the_output_of_a_task_that_has_ended_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    class Counted(OutputFeed):
        async def pieces(self, max_bytes: int) -> AsyncIterator[tuple[int, str]]:
            reads.append(self._task.uid)
            async for piece in super().pieces(max_bytes):
                yield piece

    monkeypatch.setattr("rhapsody_mcp.toolsets.waiting.until.OutputFeed", Counted)
    backend, may_end = Printing(), anyio.Event()

    async def script(spec: TaskSpec, _: object) -> Outcome:
        if spec.uid == "task.000001[2]":
            await may_end.wait()
        return backend._end()

    async with running(backend, for_each=3) as agent:
        backend.script = script
        backend.end_attempt()
        opened = agent.sessions.get("session-1")
        await opened.session.wait_tasks(leaves(opened.session.tasks)[:2], timeout=60)
        condition = Condition(opened, Until(task="train", text="ready"))
        assert await condition.answer() is None and set(reads) == {f"task.000001[{number}]" for number in range(3)}
        reads.clear()
        assert await condition.answer() is None and set(reads) == {"task.000001[2]"}
        backend.ended_with = b"ready"
        may_end.set()
        await opened.session.wait_tasks(opened.session.tasks, timeout=60)
        assert await condition.answer() == (True, "train[2] DONE printed: ready")


HISTORY: list[int | float | None] = [1 / (number + 3) for number in range(32)]


async def test_the_history_of_numbers_takes_no_room_from_results_and_errors() -> None:
    names = ("loss", "accuracy", "learning rate")
    backend, error = Printing(failures=10), "by chance"
    async with running(backend, for_each=20) as agent:
        for number in range(20):
            numbers: dict[str, int | float | None] = dict.fromkeys(names, HISTORY[-1])
            history = dict.fromkeys(names, HISTORY)
            uid = f"task.000001[{number}]"
            backend.reports[uid](Progressed(uid, Progress(1.0, 31, 32, numbers=numbers, history=history)))
        shown = (await agent.call("get_result", **SESSION, task="train[3]"))["progress"]
        assert shown["history"]["loss"] == HISTORY
        running_rows = (await agent.call("wait_tasks", **SESSION, timeout_s=0))["running"]
        assert len(running_rows) == 5 and running_rows["train[0]"]["history"]["loss"] == HISTORY[-13:]
        backend.may_finish.set()
        waited = await agent.call("wait_tasks", **SESSION)
        assert size_of(agent.replies[-1]) < REPLY_BYTES / 2 and error in waited["failures"][0]["error"]
        rows = (await agent.call("list_tasks", **SESSION, for_each="train"))["tasks"]
        assert size_of(agent.replies[-1]) < REPLY_BYTES and len(rows) == 20
        assert {row["error"] for row in rows if "error" in row} == {f"ValueError: {error}"}
        assert all(row["progress"]["numbers"] == numbers for row in rows)
        assert all(len(row["progress"]["history"]["loss"]) == 3 for row in rows)
