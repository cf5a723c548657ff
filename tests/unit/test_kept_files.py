"""Which files a task gives out, and where their copies go."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from rhapsody_mcp.backends.base import Ended, Event
from rhapsody_mcp.backends.compute.nodes import result_files
from rhapsody_mcp.backends.compute.nodes.result_files import ResultFiles, delete_files
from rhapsody_mcp.engine.messages import FunctionResult
from rhapsody_mcp.engine.network.multiplexer import Multiplexer
from rhapsody_mcp.engine.task import kept_files
from rhapsody_mcp.engine.task.function_call import encode
from rhapsody_mcp.engine.task.kept_files import with_outputs
from rhapsody_mcp.engine.task.node_files import FILES_SOCKET, local_bindings
from rhapsody_mcp.engine.task.output import write_file
from rhapsody_mcp.ledger.records import TaskEnded
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value, load, load_json
from rhapsody_mcp.runtime.dataflow import for_each_values
from rhapsody_mcp.runtime.dataflow.for_each_values import list_with_files

LONG = "x" * 100_000


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    for name in ("a.json", "b.txt", ".hidden", "plots/one.png", "plots/deep/two.png", "out.d/x.part"):
        (tmp_path / "cwd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cwd" / name).write_text('{"loss": 0.5}')
    (tmp_path / "kept").mkdir()
    return tmp_path / "cwd"


def kept(cwd: Path, *patterns: str, returned: Any = None, max_bytes: int | None = None) -> FunctionResult:
    folder = str(cwd.parent / "kept")
    return with_outputs(FunctionResult(encode(returned, folder)), patterns, str(cwd), folder, max_bytes)


def test_a_note_tells_of_files_that_are_older_than_the_task(cwd: Path) -> None:
    os.utime(cwd / "b.txt", (1.0, 1.0))
    folder, began = str(cwd.parent / "kept"), (cwd / "a.json").stat().st_mtime
    result = with_outputs(FunctionResult(), ["a.json", "b.txt"], str(cwd), folder, None, began)
    assert result.notes == ("of its outputs these are older than the task: b.txt",)


def value_of(result: FunctionResult) -> Value:
    assert result.value is not None, result.error
    return result.value


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.json", ["a.json"]),
        ("./a.json", ["a.json"]),
        ("*", ["a.json", "b.txt"]),
        (".h*", [".hidden"]),
        ("plots/*", ["plots/one.png"]),
        ("plots/**", ["plots/deep/two.png", "plots/one.png"]),
        ("**/*.png", ["plots/deep/two.png", "plots/one.png"]),
        ("[ab].*", ["a.json", "b.txt"]),
    ],
)
def test_a_pattern_names_files_below_the_working_directory(cwd: Path, pattern: str, names: list[str]) -> None:
    assert sorted(value_of(kept(cwd, pattern)).files) == names


def test_what_is_kept_is_a_copy_of_its_own_with_the_extension_of_the_file(cwd: Path) -> None:
    value = value_of(kept(cwd, "*", "b.txt", "out.d/*", returned=[1]))
    shutil.rmtree(cwd)
    loaded = load(value)
    assert loaded["result"] == [1] and sorted(loaded["files"]) == ["a.json", "b.txt", "out.d"]
    assert all(Path(path).read_text() == '{"loss": 0.5}' for path in value.paths) and len(value.paths) == 3
    assert {os.path.splitext(path)[1] for path in value.paths} == {".json", ".txt", ".file"}


def test_a_path_leads_to_a_file_and_on_into_its_json(cwd: Path) -> None:
    loaded = load_json(value_of(kept(cwd, "a.json", "plots/*")))
    path = resolve_pointer(loaded, "/files/a.json")
    assert Path(path).read_text() == resolve_pointer(loaded, "/files/a.json", contents=True) == '{"loss": 0.5}'
    assert resolve_pointer(loaded, "/files/a.json/loss") == 0.5
    with pytest.raises(InvalidTask, match="keys"):
        resolve_pointer(loaded, "/files/plots/two.png")
    Path(path).write_bytes(b"\xff")
    for way, told in (
        ({"path": "/files/a.json/loss"}, "as JSON"),
        ({"path": "/files/a.json", "contents": True}, "text"),
    ):
        with pytest.raises(InvalidTask, match=told):
            resolve_pointer(loaded, **cast(Any, way))


def test_a_result_that_is_no_json_hides_no_files_from_the_service(cwd: Path) -> None:
    value = value_of(kept(cwd, "a.json", returned={1, 2}))
    assert load(value)["result"] == {1, 2} and list(load_json(value)) == ["files"]
    assert pickle.loads(pickle.dumps(load(value))) == load(value)


@pytest.mark.parametrize(
    ("patterns", "most", "told"),
    [
        (["*.svg"], None, "matches '*.svg'"),
        (["a.json", "plots"], None, "plots is a folder: write plots/*"),
        (["**/*"], 20, "20 is the most"),
    ],
)
def test_what_cannot_be_kept_fails_the_task_and_leaves_nothing(
    cwd: Path, patterns: list[str], most: int | None, told: str
) -> None:
    result = kept(cwd, *patterns, max_bytes=most)
    assert result.cause is Cause.ERROR and result.value is None and told in result.error
    assert not list((cwd.parent / "kept").iterdir())


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["a.json", "odd/*.png"], r"'odd/r\\udce9sum.png' is no text in UTF-8: rename it"),
        (["a.json", "odd/*.svg"], r"newest first: odd/r\udce9sum.png, "),
    ],
)
def test_a_name_that_is_no_text_can_be_told_and_not_kept(cwd: Path, patterns: list[str], told: str) -> None:
    (cwd / "odd").mkdir()
    (cwd / "odd/r\udce9sum.png").write_bytes(b"x")
    result = kept(cwd, *patterns)
    assert result.cause is Cause.ERROR and told in result.error
    assert msgspec.msgpack.encode(result) and not list((cwd.parent / "kept").iterdir())


def test_what_cannot_be_described_fails_the_task_and_leaves_nothing(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(path: str) -> str:
        raise OverflowError("a side of it is too long")

    monkeypatch.setattr(kept_files, "describe_file", describe)
    result = kept(cwd, "*")
    assert result.cause is Cause.ERROR and "a side of it is too long" in result.error
    assert not list((cwd.parent / "kept").iterdir())


def test_two_stars_do_not_lead_into_links_to_folders(cwd: Path) -> None:
    for name in ("latest", "plots/up", "plots/deep/round"):
        (cwd / name).symlink_to(cwd)
    (cwd / "c.png").symlink_to(cwd / "plots/one.png")
    everywhere = ["c.png", "plots/deep/two.png", "plots/one.png"]
    assert sorted(value_of(kept(cwd, "**/*.png")).files) == everywhere
    assert sorted(value_of(kept(cwd, "./**/**/*.png")).files) == everywhere
    assert sorted(value_of(kept(cwd, "**/deep/**")).files) == ["plots/deep/two.png"]
    assert sorted(value_of(kept(cwd, "latest/pl*s/*")).files) == ["latest/plots/one.png"]
    assert sorted(value_of(kept(cwd, "latest/**/t*.png")).files) == ["latest/plots/deep/two.png"]


def test_no_more_files_are_looked_for_than_can_be_kept(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def is_file(path: str) -> bool:
        looked_at.append(path)
        return True

    (cwd / "many").mkdir()
    for number in range(3000):
        (cwd / f"many/{number}").touch()
    monkeypatch.setattr(os.path, "isfile", is_file)
    assert "more than 1000 files" in kept(cwd, "many/*").error and len(looked_at) < 1100
    assert "more than 1000 files" in kept(cwd, "many/*[0-4]", "many/[5-9]*").error


def test_a_full_disk_fails_the_task_and_leaves_nothing(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []

    def copy(source: Any, target: Any, length: int) -> None:
        copies.append(target.name)
        if len(copies) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    result = kept(cwd, "*")
    assert result.cause is Cause.ERROR and "No space left" in result.error
    assert len(copies) == 2 and not list((cwd.parent / "kept").iterdir())


@pytest.mark.anyio
async def test_a_list_of_such_results_has_the_files_of_all(cwd: Path) -> None:
    one, two = value_of(kept(cwd, "a.json", returned=LONG)), value_of(kept(cwd, "b.txt", returned={1}))
    value = await list_with_files([one, None, two], cwd.parent / "kept")
    assert len(value.paths) == 3
    copies = {path: shutil.copy(path, path + ".copy") for path in value.paths}
    loaded = load(value.moved(copies))
    assert resolve_pointer(loaded, "/0/files/a.json").endswith(".json.copy")
    assert resolve_pointer(loaded, "/0/files/a.json/loss") == 0.5
    assert (loaded[0]["result"], loaded[1], loaded[2]["result"]) == (LONG, None, {1})


@pytest.mark.anyio
async def test_what_such_a_list_holds_itself_is_short(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cwd.parent / "kept"
    results = [value_of(kept(cwd, "a.json", returned="x" * 60_000)), encode({"y" * 60_000}, str(folder))]
    results += [value_of(kept(cwd, "b.txt", returned=LONG)), value_of(kept(cwd, "b.txt", returned=1)), encode(2, "")]
    value = await list_with_files(results, folder)
    assert len(msgspec.msgpack.encode(value)) < 3000 and len(set(value.paths)) == len(value.paths) == 6
    for loaded, result in zip(load(value), map(load, results), strict=True):
        assert loaded == result

    before, written = len(list(folder.iterdir())), [0]

    def write(data: bytes, folder: str) -> str:
        written[0] += 1
        if written[0] == 2:
            raise OSError(28, "No space left on device")
        return write_file(data, folder)

    monkeypatch.setattr(for_each_values, "write_file", write)
    with pytest.raises(OSError, match="No space"):
        await list_with_files(results, folder)
    assert len(list(folder.iterdir())) == before


# --- how they travel


def outcome(cwd: Path) -> Outcome:
    value = value_of(kept(cwd, "a.json", "plots/*", returned=LONG))
    return Outcome(state=TaskState.DONE, ended=1.0, value=value)


def test_each_file_of_a_result_is_known_to_the_ledger_and_deleted_with_it(cwd: Path) -> None:
    ended = outcome(cwd)
    assert ended.value is not None and len(ended.value.paths) == 3
    assert sorted(TaskEnded("session", "task", 0, ended).files()) == sorted(ended.value.paths)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ended), type=Outcome) == ended
    delete_files(ended, str(cwd.parent / "kept"))
    assert not list((cwd.parent / "kept").iterdir())


@pytest.mark.anyio
async def test_each_file_is_copied_from_the_node_of_the_task(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = cwd.parent / "here"
    here.mkdir()

    async def fetch(node: object, path: str, folder: str) -> str:
        return shutil.copy(path, folder)

    monkeypatch.setattr(result_files, "fetch_file", fetch)
    node = cast(Multiplexer, object())
    files = ResultFiles(lambda path: None if path.startswith(str(here)) else node)
    events: list[Event] = []
    files.report_with(events.append, str(here))(Ended("task", outcome(cwd)))
    await files.finish()
    shutil.rmtree(cwd.parent / "kept")
    (event,) = events
    assert isinstance(event, Ended) and event.outcome.value is not None
    loaded = load(event.outcome.value)
    assert loaded["result"] == LONG and resolve_pointer(loaded, "/files/a.json/loss") == 0.5


def test_each_file_is_copied_to_the_node_that_needs_it(cwd: Path) -> None:
    value = outcome(cwd).value
    assert value is not None
    link_folder, gone = cwd.parent / "link", cwd.parent / "gone"
    link_folder.mkdir()
    (cwd.parent / "kept").rename(gone)
    server = socket.create_server(str(link_folder / FILES_SOCKET), family=socket.AF_UNIX)

    def serve() -> None:
        for _ in value.paths:
            asked, _address = server.accept()
            with asked:
                name = os.path.basename(asked.recv(4096).rstrip(b"\0"))
                asked.sendall(os.fsencode(gone) + b"/" + name)

    thread = threading.Thread(target=serve)
    thread.start()
    loaded = load(local_bindings({"task": value}, str(link_folder))["task"])
    thread.join()
    server.close()
    assert loaded["result"] == LONG and resolve_pointer(loaded, "/files/a.json/loss") == 0.5
