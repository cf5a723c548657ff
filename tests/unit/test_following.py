"""What a follower of an output gets when its task has ended: what it has not read, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rhapsody_mcp.engine.task.output import collect
from rhapsody_mcp.model.values import INLINE_BYTES, Stream
from rhapsody_mcp.toolsets.output import follow

pytestmark = pytest.mark.anyio


def collected(tmp_path: Path, printed: bytes, limit: int | None) -> Stream:
    file = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    try:
        os.write(file, printed)
        return collect(file, str(tmp_path), limit)
    finally:
        os.close(file)


async def rest(stream: Stream, read: int) -> bytes:
    return b"".join([piece async for piece in follow._rest_of(stream, read)])


@pytest.mark.parametrize("count", [3_000, 300_000], ids=["short", "in a file"])
async def test_what_was_not_read_follows_whole_where_all_is_kept(tmp_path: Path, count: int) -> None:
    printed = b"".join(b"%d\n" % number for number in range(count))
    stream = collected(tmp_path, printed, None)
    assert (stream.file is None) == (len(printed) <= INLINE_BYTES)
    for read in (0, 1000, len(printed)):
        assert await rest(stream, read) == printed[read:]


@pytest.mark.parametrize(("size", "limit"), [(9_000, 4096), (900_000, 400_001)], ids=["short", "in a file"])
async def test_of_what_was_left_out_a_line_tells_and_the_end_follows(tmp_path: Path, size: int, limit: int) -> None:
    printed = bytes(65 + number * 26 // size for number in range(size))
    stream = collected(tmp_path, printed, limit)
    half, end = limit // 2, printed[size - (limit - limit // 2) :]
    line = b"\n[... %d bytes left out here ...]\n" % (size - limit)
    for read in (0, 10, half):
        assert await rest(stream, read) == printed[read:half] + line + end
    assert await rest(stream, size // 2) == line + end
    for read in (size - len(end), size - 10, size):
        assert await rest(stream, read) == printed[read:]


async def test_a_file_that_is_gone_is_told_of_with_the_end_that_is_known(tmp_path: Path) -> None:
    stream = Stream("the end", str(tmp_path / "gone"), 1_000_000)
    assert (await rest(stream, 10)).decode() == f"[its file, {stream.file}, is gone]\nthe end"
