"""What the page is made of: spans in lanes, counts, frames, pictures and traces."""

from __future__ import annotations

import asyncio
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from array import array
from base64 import b64decode
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, Session
from rhapsody_mcp.dashboard.archive import write_whole
from rhapsody_mcp.dashboard.feed import Cursor, Feed
from rhapsody_mcp.dashboard.page_text import page_html, report_html
from rhapsody_mcp.dashboard.picture import group_colors, stream_svg
from rhapsody_mcp.dashboard.report import report_data
from rhapsody_mcp.dashboard.spans import NO_LANE, Spans
from rhapsody_mcp.dashboard.trace import chrome_trace
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.outcome import Outcome, failed
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).parents[2] / "rhapsody_mcp" / "dashboard" / "page"
EVENT = {
    "type": "object",
    "required": ["ph", "pid", "tid", "name"],
    "properties": {
        "ph": {"enum": ["X", "M", "s", "f", "C"]},
        "ts": {"type": "number", "minimum": 0},
        "dur": {"type": "number", "minimum": 0},
        "pid": {"type": "integer"},
        "tid": {"type": "integer"},
        "args": {"type": "object"},
    },
    "allOf": [
        {"if": {"properties": {"ph": {"const": "X"}}}, "then": {"required": ["ts", "dur"]}},
        {"if": {"properties": {"ph": {"enum": ["s", "f"]}}}, "then": {"required": ["ts", "id", "cat"]}},
        {
            "if": {"properties": {"ph": {"const": "C"}}},
            "then": {"required": ["ts"], "properties": {"args": {"additionalProperties": {"type": "number"}}}},
        },
    ],
}
"""What "Trace Event Format" (Nat Duca, Dan Sinclair) asks of the phases that are written."""


def work() -> None: ...


class Clock:
    """Gives each task its own times: number N runs for a second, from N / 2 seconds after the beginning on."""

    def __init__(self) -> None:
        self.begin, self.number = time.time() + 1, 0

    def outcome(self, spec: TaskSpec, values: list[Any]) -> Outcome:
        started = self.begin + self.number / 2
        self.number += 1
        if spec.uid.endswith("13"):
            return failed(Cause.ERROR, "ValueError: no convergence after 13 steps", started=started)
        return Outcome(state=TaskState.DONE, started=started, ended=started + 1)


async def ended_session(*tasks: ComputeTask | ForEach) -> Session:
    async with Session([await ScriptedBackend(Clock().outcome)]) as session:
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
    return session


async def view_of(*tasks: ComputeTask | ForEach) -> SessionView:
    view = SessionView(await ended_session(*tasks), "session-1")
    await view.catch_up()
    return view


def named(count: int, stem: str = "sim") -> list[ComputeTask]:
    return [ComputeTask(work, name=f"{stem}-{number}", uid=f"task-{stem}-{number}") for number in range(count)]


# --- spans


async def test_no_two_spans_of_a_lane_overlap() -> None:
    spans = (await view_of(*named(12))).spans
    lanes: dict[int, list[tuple[float, float]]] = {}
    for span in spans:
        lanes.setdefault(span.lane, []).append((span.started, span.ended))
    for lane in lanes.values():
        lane.sort()
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(lane))
    assert sum(map(len, lanes.values())) == 12


async def test_a_rank_has_a_lane_and_a_job_counts_once() -> None:
    job = ComputeTask(work, name="job", task_backend_specific_kwargs={"type": "mpi", "ranks": 4})
    view = await view_of(job)
    assert [span.lane for span in view.spans] == [0, 1, 2, 3]
    assert {lane.kind for lane in view.spans.lanes} == {"rank"}
    assert view.head()["counts"] == {"DONE": 1}


async def test_counts_are_those_of_the_session_also_after_a_retry_and_a_replacement() -> None:
    outcomes = iter([failed(Cause.ERROR, "once"), failed(Cause.ERROR, "twice")])
    backend = ScriptedBackend(lambda spec, values: next(outcomes, None))
    async with Session([await backend]) as session:
        view = SessionView(session, "session-1")
        first, second = named(2)
        await session.submit_tasks([first, second])
        await session.wait_tasks([first, second])
        await view.catch_up()
        assert view.head()["counts"] == session.counts == {"FAILED": 2}
        epoch = view.epoch
        await session.retry(first)
        await session.wait_tasks([first])
        session.replace(second, "task-sim-2")
        await view.catch_up()
        assert view.head()["counts"] == session.counts == {"DONE": 1}
        assert view.epoch > epoch


async def test_groups_are_for_each_tasks_stems_of_names_and_kinds() -> None:
    sweep = ForEach([0, 1, 2], lambda item, number: ComputeTask(work), name="sweep")
    view = await view_of(sweep, *named(2), ComputeTask(work, name="alone"), ComputeTask(work))
    assert {*view.spans.groups} == {"sweep", "sim", "alone", "function tasks"}


async def test_a_task_that_never_ran_has_no_lane() -> None:
    backend = ScriptedBackend(lambda spec, values: failed(Cause.INVALID, "there is no such program"))
    async with Session([await backend]) as session:
        (task,) = named(1)
        await session.submit_tasks([task])
        await session.wait_tasks([task])
    view = SessionView(session, "session-1")
    view.catch_up_now()
    assert list(view.spans.lane) == [NO_LANE] and not list(view.spans)


async def test_failures_are_grouped_and_found_in_the_graph() -> None:
    first, other = named(20, "a"), named(20, "b")
    join = ComputeTask(work, name="join", after=first)
    view = await view_of(*first, *other, join)
    head = view.head()
    (group, upstream) = head["failures"]
    assert (group["cause"], group["count"], len(group["tasks"])) == ("error", 2, 2)
    assert upstream["cause"] == "upstream" and upstream["state"] == "CANCELED"
    nodes = {node["name"]: node for node in head["graph"]["nodes"]}
    assert nodes["a"]["total"] == 20 and nodes["a"]["counts"]["FAILED"] == 1
    assert ["a", "join", 20] in head["graph"]["edges"]


# --- frames


def rows(frame: bytes) -> int:
    return int(json.loads(frame)["block"]["rows"])


async def test_a_page_gets_what_it_lacks_and_all_pages_share_a_frame() -> None:
    async with Session([await ScriptedBackend(Clock().outcome)]) as session:
        feed = Feed(SessionView(session, "session-1"))
        await session.wait_tasks(await submitted(session, named(3)))
        frame, cursor, version = await feed.next_frame(Cursor(), -1)
        assert rows(frame) == 3 and json.loads(frame)["block"]["reset"]
        asking = [asyncio.create_task(feed.next_frame(cursor, version)) for _ in range(10)]
        await session.wait_tasks(await submitted(session, named(2, "more")))
        frames = await asyncio.gather(*asking)
        last = max(version for _, _, version in frames)
        whole = await feed.next_frame(cursor, last - 1)
        assert rows(whole[0]) == 2 and not json.loads(whole[0])["block"]["reset"]
        assert len({frame for frame, _, _ in frames}) == 1


async def submitted(session: Session, tasks: list[ComputeTask]) -> list[ComputeTask]:
    await session.submit_tasks(tasks)
    return tasks


@pytest.mark.parametrize("text", ["", "1.2.3", "x.1.2.3", "9999.999999999999999999.0.0"])
async def test_a_page_with_an_unknown_cursor_begins_anew(text: str) -> None:
    feed = Feed(await view_of(*named(3)))
    frame, _, _ = await feed.next_frame(Cursor.read(text), -1)
    assert rows(frame) == 3 and json.loads(frame)["block"]["reset"]


async def test_columns_are_little_endian_numbers_of_the_types_that_the_page_reads() -> None:
    view = await view_of(*named(4))
    block = view.spans.block(1, 3)
    script = (PAGE / "spans.js").read_text(encoding="utf-8")
    types = dict(re.findall(r"(\w+): (\w+)Array", script.partition("COLUMNS = {")[2].partition("}")[0]))
    sizes = {"Float64": 8, "Float32": 4, "Uint16": 2, "Uint8": 1}
    assert {name: len(b64decode(block[name])) // 2 for name in types} == {name: sizes[types[name]] for name in types}


# --- pictures and traces


def test_the_colours_of_the_picture_are_those_of_the_page() -> None:
    script = (PAGE / "util.js").read_text(encoding="utf-8")
    palette = re.findall(r'"(#[0-9a-f]{6})"', script.partition("PALETTE")[2].partition("]")[0])
    assert {*group_colors([str(number) for number in range(20)])} == {*palette}
    assert len({*group_colors(["first", "second", "third"])}) == 3


async def test_the_picture_is_svg_with_a_bar_a_task() -> None:
    root = ElementTree.fromstring(stream_svg(await view_of(*named(5), ComputeTask(work, name="<b>&"))))
    paths = [path for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("fill")]
    assert sum(path.get("d", "").count("M") for path in paths) == 6
    assert any(element.text == "<b>&" for element in root.iter("{http://www.w3.org/2000/svg}text"))


async def test_a_trace_has_an_event_a_task_and_arrows_between_them() -> None:
    first, second = named(2)
    third = ComputeTask(work, name="third", after=[first, second])
    events = msgspec.json.decode(chrome_trace(await view_of(first, second, third)))["traceEvents"]
    validator = jsonschema_rs.validator_for(EVENT)
    for event in events:
        validator.validate(event)
    spans = [event for event in events if event["ph"] == "X"]
    assert [span["name"] for span in spans] == ["sim-0", "sim-1", "third"]
    assert [round(span["dur"]) for span in spans] == [1_000_000] * 3
    assert sum(event["ph"] == "s" for event in events) == sum(event["ph"] == "f" for event in events) == 2
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(span["pid"], span["tid"]) for span in spans} <= threads


# --- the report and the page


async def test_a_report_holds_every_task_and_no_text_can_end_its_data() -> None:
    hostile = "</script><script>alert(1)</script>"
    view = await view_of(*named(3), ComputeTask(work, name=hostile))
    data = report_data(view, {"allocation": "none"})
    name = data["tasks"]["fields"].index("name")
    assert [row[name] for row in data["tasks"]["rows"]] == ["sim-0", "sim-1", "sim-2", hostile]
    text = report_html(data)
    assert hostile not in text and text.count("<script") == 2
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert held and json.loads(held[1])["tasks"] == json.loads(msgspec.json.encode(data["tasks"]))


@pytest.mark.parametrize(("source", "reaches"), [("http", "'self'"), ("app", "'none'")])
def test_the_page_loads_nothing_and_runs_no_other_script(source: Any, reaches: str) -> None:
    page = page_html(source)
    markup = re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"'](?!data:|#)|@import|url\(", markup)
    assert f"connect-src {reaches};" in page
    assert "innerHTML" not in "".join(file.read_text(encoding="utf-8") for file in PAGE.glob("[!u]*.js"))
    assert "{{" not in page.partition("<script>")[0]


def test_a_row_takes_the_memory_that_is_said() -> None:
    columns = [column for column in vars(Spans()).values() if isinstance(column, array)]
    assert sum(column.itemsize for column in columns) <= 34


async def test_a_page_begins_with_the_first_submission_also_of_a_task_that_runs() -> None:
    backend = ScriptedBackend(Clock().outcome)
    async with Session([await backend]) as session:
        view = SessionView(session, "session-1")
        backend.may_finish.clear()
        (first,) = await submitted(session, named(1))
        backend.may_finish.set()
        await session.wait_tasks([first])
        backend.may_start.clear()
        (waiting,) = await submitted(session, named(1, "waits"))
        waiting.submitted = (first.submitted or 0.0) - 5
        await view.catch_up()
        assert view.head()["first"] == waiting.submitted
        backend.may_start.set()


async def test_only_the_groups_of_the_critical_path_are_marked() -> None:
    first = named(1, "trainer")
    last = ComputeTask(work, name="trainer", after=first)
    view = await view_of(*named(45, "t"), *first, last)
    assert {node["name"] for node in view.head()["graph"]["nodes"] if node["path"]} == {"trainer"}


async def test_what_is_left_out_of_the_failures_is_counted() -> None:
    words = iter(f"unlike {'a' * number}" for number in range(70))
    backend = ScriptedBackend(lambda spec, values: failed(Cause.ERROR, next(words)))
    async with Session([await backend]) as session:
        await session.wait_tasks(await submitted(session, named(70)))
    view = SessionView(session, "session-1")
    view.catch_up_now()
    head = view.head()
    assert (len(head["failures"]), head["failures_left_out"]) == (50, 20)
    assert head["failures"][0]["tasks"][0]["name"] == "sim-69"


def test_a_file_is_written_whole_through_links_and_never_in_the_place_of_a_folder_or_a_device(tmp_path: Path) -> None:
    file, link, folder = tmp_path / "file", tmp_path / "link", tmp_path / "folder"
    folder.mkdir()
    link.symlink_to(file)
    write_whole(link, b"one")
    assert (file.read_bytes(), link.is_symlink()) == (b"one", True)
    for target in (folder, Path("/dev/null")):
        with pytest.raises(OSError, match="a folder or a device is there"):
            write_whole(target, b"two")
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(folder / "none" / "file", b"three")
    assert missing.value.filename == str(folder / "none" / "file")
    assert [*folder.iterdir()] == [] and Path("/dev/null").is_char_device()
