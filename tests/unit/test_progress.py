"""What is read of the progress that tasks tell, whatever they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from rhapsody_mcp import task
from rhapsody_mcp.engine.live.progress_file import ProgressFile
from rhapsody_mcp.engine.live.progress_note import ProgressNote
from rhapsody_mcp.model.live.progress import HISTORY, Progress, advanced, progress_of, read_line

_ODD = {
    "large integers": (b'{"step": 1, "tokens": 100000000000000000000}', {"tokens": 1e20}),
    "integers beyond floats": (b'{"step": 1, "n": 1' + b"0" * 400 + b"}", {"n": None}),
    "infinity": (b'{"step": 1, "loss": Infinity}', {"loss": None}),
    "a lone surrogate": (b'{"step": 1, "message": "a\\udcff", "\\udcff": 2, "task": "\\udcff"}', {"?": 2}),
}


@pytest.mark.parametrize(("line", "numbers"), _ODD.values(), ids=_ODD)
def test_a_line_with_odd_values_can_be_sent(line: bytes, numbers: dict[str, float | None]) -> None:
    uid, progress = read_line(line, 1.0)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(progress), type=Progress)
    assert (again.step, again.numbers) == (1, numbers)
    assert msgspec.msgpack.encode(uid)


def test_a_line_that_is_nested_too_deeply_is_a_message() -> None:
    _, progress = read_line(b"[" * 10 * sys.getrecursionlimit(), 1.0)
    assert progress.message.startswith("[[[")


def test_each_line_is_read_after_more_of_them_than_are_kept_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    told = ProgressFile(str(path))
    seen: list[float | None] = []
    with path.open("ab", buffering=0) as file:
        for step in range(60):
            file.write(json.dumps({"step": step, "message": "x" * 40_000}).encode() + b"\n")
            assert told.advance() and not told.advance()
            assert told.progress is not None
            seen.append(told.progress.step)
        assert seen == list(range(60)) and path.stat().st_blocks * 512 < 1_500_000
        file.write(b'{"step": 60}')
    final = told.final()
    assert final is not None and final.step == 60


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 600, 1000, 1025])
def test_the_history_is_of_the_whole_run(count: int) -> None:
    told = None
    for step in range(count):
        told = advanced(told, progress_of({"loss": step}, 1.0))
    assert told is not None
    *spread, newest = (int(value or 0) for value in told.history["loss"])
    stride = spread[1] - spread[0] if len(spread) > 1 else 1
    assert newest == count - 1 and spread == list(range(0, newest, stride))
    assert min(count, 16) <= len(told.history["loss"]) <= HISTORY


def test_a_number_that_is_told_now_and_then_has_a_history_of_its_own() -> None:
    told = progress_of({"loss": 1}, 1.0)
    for step in range(5):
        told = advanced(told, progress_of({"loss": step} if step % 2 else {"rate": step}, 1.0))
    assert told.history == {"loss": [1, 1, 3], "rate": [0, 2, 4]}


def test_a_number_has_another_name_than_task() -> None:
    with pytest.raises(TypeError, match="task is no name"):
        task.progress(1, task=7)


def test_a_function_may_tell_numbers_that_are_too_large_to_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(task.VARIABLE, "")
    before = task.current.tell
    note = ProgressNote(str(tmp_path / "progress"))
    try:
        task.progress(1, tokens=10**20)
    finally:
        task.current.tell = before
    told = note.take()
    assert told is not None and told.numbers == {"tokens": 1e20} and msgspec.msgpack.encode(told)
