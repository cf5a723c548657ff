"""How a task shows itself in a cell of a notebook: as HTML without scripts, with every text escaped and cut."""

from __future__ import annotations

import pickle
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, Session, TaskState
from rhapsody_mcp.model.outcome import Outcome, RankOutcome, Usage
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Stream, Value
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio

HOSTILE = "</pre></td><script>alert('1')</script><img src=x onerror=alert(2)>\ud800"


class Elements(HTMLParser):
    """The elements of a text, and what they say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.said = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def html_of(task: Task) -> str:
    """The HTML of a task, which has nothing but the elements that it is made of."""
    html = task._repr_html_()
    assert Elements(html).tags <= {"div", "b", "span", "table", "tr", "th", "td", "pre", "br"}
    assert Elements(html).attributes <= {"style"}
    html.encode()  # what cannot be sent to a browser is not there
    return html


def said(task: Task) -> str:
    return re.sub(r"\s+", " ", Elements(html_of(task)).said)


async def ran(*tasks: Task, script: Any) -> None:
    async with Session([ScriptedBackend(script)]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)


def outcome(state: TaskState = TaskState.DONE, **fields: Any) -> Outcome:
    return Outcome(state=state, ended=time.time(), started=time.time() - 2, **fields)


async def test_a_task_shows_its_state_times_result_and_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    task = ComputeTask(abs, args=(1,), name="size")
    assert "size" in said(task) and "NEW" in said(task)
    value = Value("json", "dict", 9, b'{"loss":1}')
    printed = Stream("…epoch 1\nepoch 2\n", file=str(tmp_path / "out"), size=300_000)
    await ran(task, script=lambda *_: outcome(value=value, stdout=printed, notes=("left a process",)))
    text = said(task)
    assert task.uid in text and "DONE" in text and "runs" in text and "abs" in text and "onscripted" in text
    assert '{"loss":1}' in text and "epoch 2" in text and "the end of 300,000 bytes" in text
    assert "of execution" in text and "left a process" in text and "error" not in text


async def test_what_a_task_says_stays_text() -> None:
    task = ComputeTask(executable=f"/bin/{HOSTILE}".replace("\ud800", ""), name=HOSTILE, backend="scripted")
    value = Value("pickle", HOSTILE, 9, pickle.dumps(1), preview=HOSTILE, about=HOSTILE)
    ended = outcome(
        TaskState.FAILED,
        cause=Cause.ERROR,
        error=HOSTILE,
        traceback=HOSTILE,
        value=value,
        stdout=Stream(HOSTILE),
        stderr=Stream(HOSTILE),
        notes=(HOSTILE,),
        nodes=(HOSTILE,),
    )
    await ran(task, script=lambda *_: ended)
    html = html_of(task)
    assert "FAILED (error)" in said(task) and said(task).count("<script>alert('1')</script>") == 9
    assert "<script" not in html and "<img" not in html


async def test_a_failed_sweep_shows_its_counts_and_its_failures_by_cause() -> None:
    def script(spec: TaskSpec, _: object) -> int:
        number = int(spec.uid.rpartition("[")[2][:-1])
        if number % 3 == 0:
            raise ValueError(f"{HOSTILE} {number}")
        return number

    sweep = ForEach(list(range(100)), lambda item, _: ComputeTask(abs, args=(item,)), name="sweep")
    assert "NEW 100" in said(sweep)
    await ran(sweep, script=script)
    text = said(sweep)
    assert "DONE 66" in text and "FAILED 34" in text and text.count("ValueError") == 1
    assert "34 FAILED (error)" in text and "sweep[0], sweep[3], sweep[6], sweep[9], 30 more" in text
    html_of(sweep)


async def test_a_sweep_over_a_result_shows_itself_before_it_has_tasks() -> None:
    first = ComputeTask(list, name="first")
    sweep = ForEach(first, lambda item, _: ComputeTask(abs, args=(item,)), name="sweep")
    assert "sweep" in said(sweep) and "NEW" in said(sweep)


async def test_long_texts_are_cut() -> None:
    task = ComputeTask(abs, args=(1,), name="n" * 10**6)
    long = "<" * 10**6
    ranks = tuple(RankOutcome(rank, stdout=Stream(long)) for rank in range(100))
    streams = {"stdout": Stream(long), "stderr": Stream(long), "usage": Usage(3, 4)}
    value = Value("json", "str", 10**6, f'"{long}"'.encode())
    ended = outcome(
        TaskState.FAILED, error=long, traceback=long, notes=(long,) * 99, ranks=ranks, value=value, **streams
    )
    await ran(task, script=lambda *_: ended)
    assert len(html_of(task)) < 100_000 and "3 in, 4 out" in said(task)


async def test_a_running_task_shows_for_how_long_it_runs() -> None:
    backend = ScriptedBackend(lambda *_: None)
    backend.may_finish.clear()
    async with Session([backend]) as session:
        task = ComputeTask(abs, args=(1,))
        runs = anyio.Event()
        session.on_change.add(lambda task: runs.set() if task.state is TaskState.RUNNING else None)
        await session.submit_tasks(task)
        await runs.wait()
        session.on_change.clear()
        assert "RUNNING" in said(task) and "runs for 0" in said(task)
