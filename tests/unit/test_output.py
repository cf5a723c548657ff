"""What is kept of long output."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rhapsody_mcp.engine.task import output_files
from rhapsody_mcp.engine.task.output import collect, left_out, move_stream
from rhapsody_mcp.engine.task.output_files import Output
from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.values import Stream

MOST = 1024 * 1024


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    yield opened
    os.close(opened)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    opened = Output(str(tmp_path / "out"), MOST, [0])
    yield opened
    opened.close()


def write(file: int, megabytes: int) -> None:
    for number in range(megabytes):
        os.write(file, bytes([65 + number]) * 1024 * 1024)


def test_the_middle_of_a_long_file_is_freed_while_it_is_written(file: int, tmp_path: Path) -> None:
    for megabytes in (5, 3):
        write(file, megabytes)
        output_files._trim(file, MOST)
        assert os.fstat(file).st_blocks * 512 <= MOST + 3 * 4096
    stream = collect(file, str(tmp_path), MOST)
    assert stream.left_out == 8 * MOST - MOST
    half = MOST // 2
    assert stream.read() == "A" * half + f"\n[... {7 * MOST} bytes left out here ...]\n" + "C" * half
    assert stream.size == len(stream.read()) and stream.text == stream.read()[-len(stream.text) :]
    assert os.fstat(file).st_size == 0


def test_a_program_that_opens_its_stdout_anew_takes_nothing_away(output: Output, tmp_path: Path) -> None:
    os.write(output.writer, b"header\n")
    Path(f"/dev/fd/{output.writer}").write_text("body\n")
    output.close_writer()
    assert not output.drain(), "nobody writes any more"
    assert (tmp_path / "out").read_text() == "header\nbody\n"


def test_a_flood_takes_no_more_of_the_disk_than_a_quarter_above_what_is_kept(output: Output, tmp_path: Path) -> None:
    for number in range(256):
        os.write(output.writer, bytes([65 + number % 26]) * 32 * 1024)
        assert output.drain()
        assert (tmp_path / "out").stat().st_blocks * 512 <= MOST * 5 // 4 + 64 * 1024
    assert (tmp_path / "out").stat().st_size == 8 * MOST


def test_who_looks_at_the_number_of_moves_knows_what_is_under_way(tmp_path: Path) -> None:
    moves = [0]
    output = Output(str(tmp_path / "out"), None, moves)
    output.drain()
    assert moves[0] % 2 == 0
    before = moves[0]
    os.write(output.writer, b"x")
    output.drain()
    assert moves[0] > before and moves[0] % 2 == 0
    output.close()


def test_a_full_disk_does_not_stop_the_program(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    os.write(output.writer, b"x" * 1000)
    monkeypatch.setattr(os, "write", is_full)
    assert output.drain()


def test_what_a_full_disk_cost_is_told_once_in_its_place(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write_file, room = tmp_path / "out", os.write, 1000

    def write(descriptor: int, data: bytes) -> int:
        if descriptor == output._file and file.stat().st_size + len(data) > room:
            raise OSError(errno.ENOSPC, "full")
        return write_file(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(5):
        write_file(output.writer, b"%d" % number * 400)
        output.drain()
    room = 10_000
    write_file(output.writer, b"end")
    output.drain()
    text = file.read_text()
    line = "\n[... the disk was full: what was printed here is lost ...]\n"
    assert text == "0" * 400 + "1" * (400 - len(line)) + line + "end"


def test_what_is_short_stays_as_it_is(file: int, tmp_path: Path) -> None:
    os.write(file, b"short")
    assert collect(file, str(tmp_path), MOST) == Stream("short", None, 5)
    assert collect(file, str(tmp_path), MOST) == Stream()


def test_a_limit_that_is_smaller_than_a_message_holds_too(file: int, tmp_path: Path) -> None:
    os.write(file, b"a" * 5000 + b"b" * 5000)
    stream = collect(file, str(tmp_path), 4096)
    assert stream.file is None and stream.left_out == 10_000 - 4096
    assert stream.text == "a" * 2048 + "\n[... 5904 bytes left out here ...]\n" + "b" * 2048


def test_where_no_hole_can_be_made_the_file_is_cut(file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "punch_hole", lambda *_: False)  # as on a file system that cannot
    write(file, 3)
    output_files._trim(file, MOST)
    os.write(file, b"end")
    text = collect(file, str(tmp_path), MOST).read()
    assert text == "A" * (MOST // 2) + "\n[left out]\nend"


def test_a_file_with_a_name_is_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for size, most in ((10, None), (200_000, None), (200_000, MOST), (3 * MOST, MOST)):
        path = tmp_path / "printed"
        path.write_bytes(b"x" * size)
        stream = move_stream(str(path), str(folder), most)
        assert not path.exists() and stream.read().count("x") == min(size, most or size)


def test_output_for_which_the_disk_has_no_room_is_cut_and_nothing_fails(file: int) -> None:
    write(file, 1)
    stream = collect(file, "/proc/no/such/folder", MOST)
    assert stream.file is None and stream.left_out == MOST - stream.text.count("A")


def test_a_sentence_tells_what_was_left_out() -> None:
    ranks = [RankOutcome(0), RankOutcome(1, stderr=Stream("end", "/file", 10, 90))]
    assert [note.partition(":")[0] for note in left_out(*ranks)] == ["stderr of rank 1 was too long"]
