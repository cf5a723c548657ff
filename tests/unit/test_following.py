"""What a follower of an output gets when its task has ended: what it has not read, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rhapsody_mcp.engine.task.output import collect
from rhapsody_mcp.model.values import INLINE_BYTES, Stream, gap_note
from rhapsody_mcp.toolsets.output.feed import StreamText

pytestmark = pytest.mark.anyio


def collected(tmp_path: Path, printed: bytes, limit: int | None) -> Stream:
    file = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    try:
        os.write(file, printed)
        return collect(file, str(tmp_path), limit)
    finally:
        os.close(file)


async def rest(stream: Stream, printed: bytes, read: int) -> str:
    """What follows for who has read so many bytes of what was printed."""
    text = StreamText()
    text.decoded(printed[:read])
    return "".join([piece async for piece in text.rest(stream, read, 64 * 1024)])


@pytest.mark.parametrize("count", [3_000, 300_000], ids=["short", "in a file"])
async def test_what_was_not_read_follows_whole_where_all_is_kept(tmp_path: Path, count: int) -> None:
    printed = b"".join(b"%d\n" % number for number in range(count))
    stream = collected(tmp_path, printed, None)
    assert (stream.file is None) == (len(printed) <= INLINE_BYTES)
    for read in (0, 1000, len(printed)):
        assert await rest(stream, printed, read) == printed[read:].decode()


@pytest.mark.parametrize(("size", "limit"), [(9_000, 4096), (900_000, 400_001)], ids=["short", "in a file"])
async def test_of_what_was_left_out_a_line_tells_and_the_end_follows(tmp_path: Path, size: int, limit: int) -> None:
    printed = bytes(65 + number * 26 // size for number in range(size))
    stream = collected(tmp_path, printed, limit)
    half, end = limit // 2, printed[size - (limit - limit // 2) :]
    line = b"\n[... %d bytes left out here ...]\n" % (size - limit)
    for read in (0, 10, half):
        assert await rest(stream, printed, read) == (printed[read:half] + line + end).decode()
    assert await rest(stream, printed, size // 2) == (line + end).decode()
    for read in (size - len(end), size - 10, size):
        assert await rest(stream, printed, read) == printed[read:].decode()


async def test_a_file_that_is_gone_is_told_of_with_the_end_that_is_known(tmp_path: Path) -> None:
    stream = Stream("the end", str(tmp_path / "gone"), 1_000_000)
    assert await rest(stream, bytes(10), 10) == f"[its file, {stream.file}, is gone]\nthe end"


BINARY = bytes(range(256)) * 20 + "\N{SNOWMAN}\N{SNOWMAN}".encode()


@pytest.mark.parametrize("limit", [None, 4096], ids=["whole", "cut"])
async def test_output_that_is_no_text_is_not_given_twice(tmp_path: Path, limit: int | None) -> None:
    stream = collected(tmp_path, BINARY, limit)
    assert len(stream.text.encode()) > stream.size
    assert await rest(stream, BINARY, len(BINARY)) == ""
    assert await rest(stream, BINARY, len(BINARY) - 6) == "\N{SNOWMAN}\N{SNOWMAN}"
    for read in (0, 150, 900):
        assert BINARY[:read].decode("utf-8", "replace") + await rest(stream, BINARY, read) == stream.text


@pytest.mark.parametrize("count", [10, 50_000], ids=["short", "in a file"])
async def test_a_character_that_was_read_in_part_follows_whole(tmp_path: Path, count: int) -> None:
    printed = "\N{SNOWMAN}".encode() * count
    stream, text = collected(tmp_path, printed, None), StreamText()
    begin = text.decoded(printed[:4])
    pieces = [piece async for piece in text.rest(stream, 4, 64 * 1024)]
    assert begin + "".join(pieces) == printed.decode()


@pytest.mark.parametrize("count", [1, 15_000], ids=["short", "in a file"])
async def test_an_output_that_is_shorter_than_what_was_read_is_another(tmp_path: Path, count: int) -> None:
    again = b"again\n" * count
    assert await rest(collected(tmp_path, again, None), b"x" * 100_000, 100_000) == "\n" + again.decode()


async def test_the_end_that_was_read_is_not_given_again_where_the_middle_was_left_out(tmp_path: Path) -> None:
    stream = Stream(gap_note(1000).decode() + "the end", None, len(gap_note(1000)) + 7, 1000)
    assert await rest(stream, b"", 1007) == ""
    assert await rest(stream, b"", 1004) == "end"
