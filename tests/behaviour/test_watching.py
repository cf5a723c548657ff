"""Running tasks are watched through an engine that is scripted: notices, progress notifications, conditions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from rhapsody_mcp.backends.base import Progressed, Report
from rhapsody_mcp.model.live.output import OutputPart, OutputQuery, Printed
from rhapsody_mcp.model.live.progress import Progress, advanced, read_line
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.values import Reader
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import ERAS, Agent, open_agent, perform
from tests.behaviour.test_resources import AT_ONCE, Ears, read, subscribed

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
TRAIN = "rhapsody://sessions/session-1/tasks/train"


class WatchedBackend(ScriptedBackend):
    """Its tasks print and tell what a test lays down."""

    def __init__(self) -> None:
        super().__init__(perform)
        self.printed, self.gap = b"", (0, 0)
        self.reports: dict[str, Report] = {}

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        self.reports |= {run.spec.uid: report for run in task_runs}
        super().submit(task_runs, report, read)

    async def read_output(self, uid: str, query: OutputQuery) -> Printed | None:
        size = len(self.printed)
        start = query.starts[0] if query.starts[0] >= 0 else max(0, size + query.starts[0])
        if self.gap[0] <= start < self.gap[1]:
            start = self.gap[1]
        end = self.gap[0] if start < self.gap[0] else size
        data = self.printed[start : min(end, start + query.max_bytes)]
        return OutputPart(start, data, size, self.gap), OutputPart()

    def tell(self, uid: str, **numbers: float) -> None:
        self.reports[uid](Progressed(uid, Progress(1.0, 3, 20, "epoch 3", dict(numbers))))


@pytest.fixture
def ears() -> Any:
    opened = Ears()
    yield opened
    opened.close()


@pytest.fixture
def backend() -> WatchedBackend:
    return WatchedBackend()


@pytest.fixture(params=ERAS)
async def agent(request: pytest.FixtureRequest, ears: Ears, backend: WatchedBackend) -> AsyncIterator[Agent]:
    async with open_agent(request.param, backend, AT_ONCE, message_handler=ears) as opened:
        await opened.session()
        backend.may_finish.clear()
        task = {"name": "train", "executable": "/bin/train"}
        await opened.call("submit_tasks", **SESSION, tasks=[task])
        with anyio.fail_after(60):
            while (await opened.call("list_tasks", **SESSION))["tasks"][0]["state"] != "RUNNING":
                await anyio.lowlevel.checkpoint()
        yield opened
        backend.may_finish.set()


async def test_a_subscriber_hears_that_the_output_of_a_running_task_grows(
    agent: Agent, ears: Ears, backend: WatchedBackend
) -> None:
    log = f"{TRAIN}/stdout"
    with anyio.fail_after(60):
        async with subscribed(agent.client, log):
            for line in (b"one\n", b"two\n"):
                backend.printed += line
                ears.heard.clear()
                await ears.until(log)
            assert await read(agent, log) == "one\ntwo\n"


async def test_a_subscriber_hears_of_progress(agent: Agent, ears: Ears, backend: WatchedBackend) -> None:
    with anyio.fail_after(60):
        async with subscribed(agent.client, TRAIN):
            backend.tell("task.000001", loss=0.5)
            await ears.until(TRAIN)
    assert '"numbers":{"loss":0.5}' in await read(agent, TRAIN)


async def test_progress_is_in_every_reply_and_in_progress_notifications(agent: Agent, backend: WatchedBackend) -> None:
    backend.tell("task.000001", loss=0.5)
    told: list[str | None] = []
    heard = anyio.Event()

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        told.append(message)
        heard.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            wait = partial(agent.client.call_tool, "wait_tasks", {**SESSION, "timeout_s": 50}, progress_callback=hear)
            group.start_soon(wait)
            await heard.wait()
            group.cancel_scope.cancel()
    assert told[0] == "0 of 1 ended; train: 3 of 20, epoch 3, loss 0.5"
    waited = await agent.call("wait_tasks", **SESSION, timeout_s=0)
    assert waited["open"] == ["train RUNNING (3 of 20, epoch 3, loss 0.5)"]
    assert waited["running"]["train"] == {"step": 3, "of": 20, "message": "epoch 3", "numbers": {"loss": 0.5}}
    listed = await agent.call("list_tasks", **SESSION)
    assert listed["tasks"][0]["progress"]["step"] == 3 and "(3 of 20, epoch 3, loss 0.5)" in agent.texts[-1]
    shown = await agent.call("get_result", **SESSION, task="train")
    assert shown["progress"]["numbers"] == {"loss": 0.5}


async def test_a_wait_ends_when_the_number_is_told_and_not_before(agent: Agent, backend: WatchedBackend) -> None:
    until = {"task": "train", "field": "loss", "below": 0.4, "above": 0.1}
    waited = await agent.call("wait_tasks", **SESSION, until=until, timeout_s=0)
    assert "so far it told nothing. A function tells with rhapsody_mcp.task.progress" in waited["until"]["text"]
    backend.tell("task.000001", other=1)
    waited = await agent.call("wait_tasks", **SESSION, until=until, timeout_s=0)
    assert waited["until"]["text"] == "not yet loss above 0.1 and below 0.4 of train: so far it told other"
    for loss, met in ((0.5, False), (0.05, False), (0.3, True)):
        backend.tell("task.000001", loss=loss)
        waited = await agent.call("wait_tasks", **SESSION, until=until, timeout_s=0 if not met else 50)
        assert waited["until"]["met"] is met
    backend.may_finish.set()
    waited = await agent.call("wait_tasks", **SESSION, until={"task": "train", "field": "loss", "below": 0.2})
    assert waited["until"]["text"].startswith("train ended DONE without loss below 0.2; the last was 3 of 20")


async def test_of_an_output_over_the_limit_both_ends_are_read_and_the_gap_is_named(
    agent: Agent, backend: WatchedBackend
) -> None:
    backend.printed, backend.gap = b"first\n" + b"x" * 5000 + b"\nlast\n", (6, 5000)
    assert (await agent.call("get_result", **SESSION, task="train", output="head"))["stdout"] == "first\n"
    assert (await agent.call("get_result", **SESSION, task="train", output="tail"))["stdout"].endswith("x\nlast\n")
    found = await agent.call("get_result", **SESSION, task="train", search="first|last|left out")
    assert [line.partition(": ")[2] for line in found["stdout"].splitlines()] == [
        "first",
        "[... 4994 bytes left out here ...]",
        "last",
    ]


async def test_a_text_that_is_split_between_two_reads_is_found(agent: Agent, backend: WatchedBackend) -> None:
    backend.printed = b"loading the mo"
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            waited = await agent.call(
                "wait_tasks", **SESSION, until={"task": "train", "text": "MODEL is"}, timeout_s=50
            )
            assert waited["until"] == {"met": True, "text": "train RUNNING printed: loading the model is done"}

        group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        backend.printed += b"del is done"


async def test_a_prompt_has_no_condition(backend: WatchedBackend) -> None:
    async with open_agent(backend=backend, settings=Settings()) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "asked", "prompt": "x"}])
        refusal = await agent.refusal("wait_tasks", **SESSION, until={"task": "asked", "text": "x"})
        assert "asked is a prompt, which tells and prints nothing while it runs" in refusal


@pytest.mark.parametrize(
    ("line", "uid", "step", "message", "numbers"),
    [
        (b'{"step": 3, "loss": 0.5, "task": "t1"}', "t1", 3, "", {"loss": 0.5}),
        (b'{"message": "half", "ok": true, "name": "x"}', "", None, "half", {}),
        (b'{"loss": NaN, "size": 1e999}', "", None, "", {"loss": None, "size": None}),
        (b"plain words\r", "", None, "plain words", {}),
        (b"[1, 2]", "", None, "[1, 2]", {}),
        (b"\xff\xfe", "", None, "\ufffd\ufffd", {}),
    ],
)
def test_lines_of_progress(
    line: bytes, uid: str, step: int | None, message: str, numbers: dict[str, float | None]
) -> None:
    of, progress = read_line(line, 1.0)
    assert (of, progress.step, progress.message, progress.numbers) == (uid, step, message, numbers)


def test_the_history_of_a_number_stays_short_and_covers_the_whole_run() -> None:
    progress = None
    for step in range(1000):
        progress = advanced(progress, read_line(b'{"loss": %d}' % step, float(step))[1])
    assert progress is not None
    history = [value for value in progress.history["loss"] if value is not None]
    assert history[0] == 0 and history[-1] == 999 and len(history) <= 32 and history == sorted(history)


def test_what_a_line_leaves_out_stays_as_it_was() -> None:
    first = read_line(b'{"step": 1, "of": 9, "message": "a", "loss": 2}', 1.0)[1]
    later = advanced(first, read_line(b'{"accuracy": 0.5}', 2.0)[1])
    assert (later.step, later.of, later.message, later.numbers) == (1, 9, "a", {"loss": 2, "accuracy": 0.5})
