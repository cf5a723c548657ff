"""How a session shows itself: its HTML, its displays in a notebook, its bars in a terminal, and the files it writes."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import re
import stat
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from rhapsody_mcp.api import ComputeTask, ForEach, Session
from rhapsody_mcp.dashboard.live.notebook import NotebookDisplay
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Value
from rhapsody_mcp.testing import ScriptedBackend
from tests.unit.test_task_html import HOSTILE, Elements

pytestmark = pytest.mark.anyio

DONE = TaskState.DONE
ELEMENTS = {"div", "b", "span", "svg", "title", "path", "rect", "text"}


def script(spec: TaskSpec, _: object) -> int:
    """Every seventh item of a ForEach fails."""
    number = int(spec.uid.rpartition("[")[2][:-1]) if "[" in spec.uid else 1
    if number % 7 == 0:
        raise ValueError(f"{HOSTILE} {number}")
    return number


def sweep(count: int, name: str = "sweep") -> ForEach:
    return ForEach(list(range(count)), lambda item, _: ComputeTask(abs, args=(item,)), name=name)


def said(html: str) -> str:
    elements = Elements(html)
    assert elements.tags <= ELEMENTS and not any(name.startswith("on") for name in elements.attributes)
    html.encode()
    return elements.said


# --- what it shows


async def test_a_session_shows_its_counts_its_failures_by_cause_and_its_task_stream() -> None:
    async with Session([ScriptedBackend(script)], uid=HOSTILE) as session:
        assert "no tasks yet" in said(session._repr_html_())
        tasks = [sweep(70, HOSTILE), ComputeTask(abs, args=(1,), name=f"{HOSTILE}-1")]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        html = session._repr_html_()
        text = said(html)
        assert "DONE 61" in text and "FAILED 10" in text and text.count("10 FAILED (error): ValueError") == 1
        assert "on average" in text and "closed" not in text
        assert "<script" not in html and "<img" not in html
        svg = html[html.index("<svg") : html.index("</svg>") + 6]
        assert len(ET.fromstring(svg).findall(".//{*}path")) >= 3
    assert "(closed)" in said(session._repr_html_())


async def test_what_a_session_shows_is_short_however_many_tasks_it_has() -> None:
    """Also where they ran in so many workers that few pixels are left for the bar of each."""
    places = (divmod(number, 256) for number in itertools.count())
    first = time.time() + 100  # after the submission

    def in_a_lane_of_many(spec: TaskSpec, _: object) -> Outcome:
        second, worker = next(places)
        value = Value("json", "int", 1, b"1")
        return Outcome(state=DONE, started=first + second, ended=first + second + 0.99, worker=worker, value=value)

    async with Session([ScriptedBackend(in_a_lane_of_many)]) as session:
        sweeps = [sweep(1000, f"{name}{HOSTILE * 30}") for name in "abcdefghijklmnopqrstuvwxy" * 4]
        await session.submit_tasks(sweeps)
        await session.wait_tasks(sweeps)
        html = session._repr_html_()
        assert "DONE 100,000" in said(html) and 50_000 < len(html) < 300_000
        assert len(sweeps[0]._repr_html_()) < 20_000


async def test_a_session_tells_its_progress_and_its_states_in_its_repr() -> None:
    async with Session([ScriptedBackend(script)], uid="s") as session:
        assert repr(session) == "<Session s: no tasks>"
        await session.wait_tasks(await submitted(session, sweep(8)))
        assert repr(session) == "<Session s: 2 FAILED, 6 DONE>"
    assert repr(session) == "<Session s (closed): 2 FAILED, 6 DONE>"


async def submitted(session: Session, *tasks: Any) -> list[Any]:
    await session.submit_tasks(tasks)
    return list(tasks)


async def test_the_numbers_are_those_of_all_tasks_once_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rhapsody_mcp.dashboard.view._STATISTICS_SHARE", 10**9)
    async with Session([ScriptedBackend(script)]) as session:
        assert "on average" not in session._repr_html_()
        await session.wait_tasks(await submitted(session, sweep(8)))
        assert "on average" in session._repr_html_()


async def test_running_tasks_tell_how_far_they_are() -> None:
    backend = ScriptedBackend(script)
    backend.may_finish.clear()
    async with Session([backend]) as session:
        task = ComputeTask(abs, args=(1,), name=HOSTILE)
        runs = asyncio.Event()
        session.on_change.add(lambda task: runs.set() if task.state is TaskState.RUNNING else None)
        await session.submit_tasks(task)
        await runs.wait()
        task.progress = Progress(0.0, 3, 20, HOSTILE, {"loss": 0.5})
        text = said(session._repr_html_())
        assert "RUNNING 1" in text and "3 of 20" in text and "loss 0.5 (15%)" in text


# --- in a notebook


class FakeShell:
    """What IPython is for a display: keeps what is published, and its events."""

    def __init__(self) -> None:
        self.display_pub, self.events = self, self
        self.outputs: list[tuple[str, bool, str]] = []
        """The display id, whether it was an update, and the HTML."""
        self.published = asyncio.Event()
        self.at_end: list[Callable[..., object]] = []

    def publish(
        self,
        data: Mapping[str, str],
        metadata: Mapping[str, Any] | None = None,
        *,
        transient: Mapping[str, str] | None = None,
        update: bool = False,
    ) -> None:
        self.outputs.append(((transient or {})["display_id"], update, data["text/html"]))
        self.published.set()

    def register(self, event: str, function: Callable[..., object]) -> None:
        assert event == "post_run_cell"
        self.at_end.append(function)

    def unregister(self, event: str, function: Callable[..., object]) -> None:
        self.at_end.remove(function)

    def end_cell(self) -> None:
        for function in self.at_end[:]:
            function("result")


async def test_a_displayed_session_is_drawn_again_while_a_cell_waits_and_at_the_end_of_each_cell() -> None:
    shell, backend = FakeShell(), ScriptedBackend(script)
    backend.may_finish.clear()
    async with Session([backend]) as session:
        display = NotebookDisplay(session, shell, session._repr_html_)
        display.show()
        display.show()
        await session.submit_tasks(sweep(3))
        async with asyncio.timeout(60):
            while "RUNNING 3" not in shell.outputs[-1][2]:
                shell.published.clear()
                await shell.published.wait()
        assert len({display for display, _, _ in shell.outputs}) == 1
        assert [update for _, update, _ in shell.outputs] == [False, False, *[True] * (len(shell.outputs) - 2)]
        assert "no tasks" in shell.outputs[0][2]
        backend.may_finish.set()
        await session.wait_tasks(session.tasks)
        shell.end_cell()
        drawn = len(shell.outputs)
        assert "DONE 2" in shell.outputs[-1][2]
        shell.end_cell()
        assert len(shell.outputs) == drawn and len(session.watchers) == len(shell.at_end) == 1
    shell.end_cell()
    assert "(closed)" in shell.outputs[-1][2] and len(shell.outputs) == drawn + 1
    assert not session.watchers and not shell.at_end


async def test_many_changes_are_drawn_once() -> None:
    shell = FakeShell()
    async with Session([ScriptedBackend(script)]) as session:
        NotebookDisplay(session, shell, session._repr_html_).show()
        began = time.monotonic()
        for _ in range(20):
            await session.wait_tasks(await submitted(session, sweep(50)))
        assert len(shell.outputs) <= 2 + (time.monotonic() - began)  # at first, soon after, then once a second
        shell.end_cell()
        assert "DONE 840" in shell.outputs[-1][2]


def test_a_display_keeps_no_loop_from_its_end_and_shows_once_without_a_loop() -> None:
    backend, shells = ScriptedBackend(script), list[FakeShell]()

    async def show() -> Session:
        session, shell = Session([backend]), FakeShell()
        backend.may_finish.clear()
        NotebookDisplay(session, shell, session._repr_html_).show()
        await session.submit_tasks(sweep(3))
        await session.close()
        shells.append(shell)
        return session

    session = asyncio.run(show(), debug=True)
    shells[0].end_cell()
    assert "CANCELED 3" in said(shells[0].outputs[-1][2])
    shell = FakeShell()
    NotebookDisplay(session, shell, session._repr_html_).show()
    assert len(shell.outputs) == 1 and not shell.at_end


def test_outside_of_a_kernel_ipython_is_left_to_show_the_repr() -> None:
    with pytest.raises(NotImplementedError):
        Session()._ipython_display_()


async def test_what_another_thread_does_is_shown_at_the_end_of_a_cell() -> None:
    shell, session = FakeShell(), Session([ScriptedBackend(script)])

    async def work() -> None:
        async with session:
            await session.wait_tasks(await submitted(session, sweep(8)))

    NotebookDisplay(session, shell, session._repr_html_).show()
    await asyncio.to_thread(asyncio.run, work())
    await asyncio.sleep(0)
    assert len(shell.outputs) == 1
    shell.end_cell()
    assert "DONE 6" in shell.outputs[-1][2] and "(closed)" in shell.outputs[-1][2]


# --- in a terminal


async def test_bars_of_all_tasks_and_of_each_group_are_drawn_as_tasks_are_submitted_and_end() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=120)
    async with Session([ScriptedBackend(script)]) as session:
        with session.show_progress(console):
            for name in "abcdefghijkl":
                await session.wait_tasks(await submitted(session, sweep(10, f"{name}\x1b[31m<>[red]")))
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    last = drawn[drawn.rindex("all tasks") :]
    assert "120/120" in last and "96 DONE" in last and "24 FAILED" in last and "tasks a second" in last
    assert (
        last.count("10/10") == 8 and "a?[31m<>[red]" in last and "\x1b[31m<>" not in drawn and "4 more groups" in last
    )
    assert not session.watchers


async def test_where_nothing_can_be_drawn_anew_one_line_is_printed_at_the_end() -> None:
    console = Console(file=io.StringIO(), width=20)
    began = time.monotonic()
    async with Session([ScriptedBackend(script)], uid="s\x1b[31m") as session:
        with pytest.raises(KeyError), session.show_progress(console):
            await session.wait_tasks(await submitted(session, sweep(20)))
            raise KeyError
    assert isinstance(console.file, io.StringIO)
    line = console.file.getvalue()
    told = re.match(r"s\?\[31m: 3 FAILED, 17 DONE after ([\d.]+) s", line)
    assert told and float(told[1]) <= 1.01 * (time.monotonic() - began)  # it is told with three digits
    assert line.count("\n") == 1


async def test_bars_are_drawn_while_a_wait_goes_on() -> None:
    drawn = asyncio.Event()

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            if "1 RUNNING" in text:
                drawn.set()
            return super().write(text)

    backend = ScriptedBackend(script)
    backend.may_finish.clear()
    async with Session([backend]) as session:
        with session.show_progress(Console(file=Told(), force_terminal=True, force_interactive=True, width=100)):
            await session.submit_tasks(ComputeTask(abs, args=(1,)))
            async with asyncio.timeout(10):
                await drawn.wait()


# --- files


async def test_report_trace_and_picture_are_whole_private_files_also_after_the_end(tmp_path: Path) -> None:
    async with Session([ScriptedBackend(script)]) as session:
        tasks = [sweep(20), ComputeTask(abs, args=(1,), name=HOSTILE)]
        await session.wait_tasks(await submitted(session, *tasks))
        (tmp_path / "early.html").write_text("old")
        assert session.report(tmp_path / "early.html") == tmp_path / "early.html"
    report = session.report(str(tmp_path / "late.html"))
    for file in (tmp_path / "early.html", report):
        text = file.read_text(encoding="utf-8")
        assert "sweep[19]" in text and "ValueError" in text and "<script>alert" not in text and "<img src=x" not in text
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    trace = msgspec.json.decode(session.trace(tmp_path / "trace.json").read_bytes())
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 21
    assert ET.fromstring(session.picture(tmp_path / "stream.svg").read_bytes()).tag.endswith("svg")
    with pytest.raises(FileNotFoundError):
        session.report(tmp_path / "nowhere" / "report.html")
    with pytest.raises(IsADirectoryError):
        session.report(tmp_path)
    assert set(os.listdir(tmp_path)) == {"early.html", "late.html", "trace.json", "stream.svg"}
