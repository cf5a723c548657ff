"""What a program has printed, and files that appear whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO, Protocol

from rhapsody_mcp.engine.task.output_files import middle
from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.values import INLINE_BYTES, Stream

__all__ = ["collect", "end_part", "left_out", "move_stream", "open_part", "stopped_note", "write_file", "write_pieces"]

_TAIL_BYTES = INLINE_BYTES // 4
_PIECE_BYTES = 1024 * 1024


def write_file(data: bytes, folder: str) -> str:
    """Write a file that appears whole or not at all, and give its path."""
    return write_pieces([data], folder)


def write_pieces(pieces: Iterable[bytes], folder: str, suffix: str = ".value") -> str:
    """The same, with no more than a piece at a time in memory."""
    part = open_part(folder)
    try:
        for piece in pieces:
            part.write(piece)
        return end_part(part, suffix)
    except BaseException:
        part.close()
        os.unlink(part.name)
        raise


def open_part(folder: str) -> BinaryIO:
    """A file that nobody reads before `end_part`."""
    handle, path = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    return open(path, "wb")


def end_part(part: BinaryIO, suffix: str) -> str:
    """It is whole: where it is now."""
    part.close()
    path = part.name.removesuffix(".part") + suffix
    os.rename(part.name, path)
    return path


def collect(file: int, folder: str, most: int | None) -> Stream:
    """What was printed into this file, which is empty afterwards."""
    size = os.fstat(file).st_size
    if not size:
        return _NOTHING
    stream = _stream(file, size, folder, most)
    os.ftruncate(file, 0)
    return stream


_NOTHING = Stream()


def move_stream(path: str, folder: str, most: int | None) -> Stream:
    """The same of a file with a name, which is gone afterwards."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        if INLINE_BYTES < size and (most is None or size <= most):
            with suppress(OSError):  # where it may not be moved, it is copied
                return Stream(_text(_last(file, size)), _move(path, folder), size)
        stream = _stream(file, size, folder, most)
    finally:
        os.close(file)
    os.unlink(path)
    return stream


def _move(path: str, folder: str) -> str:
    handle, kept = tempfile.mkstemp(dir=folder, suffix=".output")
    os.close(handle)
    try:
        os.rename(path, kept)
    except OSError:
        os.unlink(kept)
        raise
    return kept


def _stream(file: int, size: int, folder: str, most: int | None) -> Stream:
    """Whole where it is short, else in a file of `folder`; of one that is too long, its beginning and its end."""
    start, end = middle(size, most) if most is not None and size > most else (size, size)
    note = f"\n[... {end - start} bytes left out here ...]\n".encode() if start < end else b""
    kept = start + len(note) + size - end
    if kept <= INLINE_BYTES:
        data = b"".join([*_pieces(file, 0, start), note, *_pieces(file, end, size)])
        return Stream(_text(data), None, len(data), end - start)
    pieces = (piece for part in (_pieces(file, 0, start), [note], _pieces(file, end, size)) for piece in part)
    last = _last(file, size)
    try:
        return Stream(_text(last), write_pieces(pieces, folder, ".output"), kept, end - start)
    except OSError:  # the disk is full: what a task did is not lost for what it printed
        return Stream(_text(last), None, len(last), size - len(last))


def _pieces(file: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (piece := os.pread(file, min(_PIECE_BYTES, end - start), start)):
        yield piece
        start += len(piece)


def _last(file: int, size: int) -> bytes:
    return os.pread(file, _TAIL_BYTES, max(0, size - _TAIL_BYTES))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def stopped_note(left_running: int) -> str:
    """A sentence on the processes that a task had started and not waited for."""
    return f"processes that still ran when it ended were stopped: {left_running}; it must wait for what it starts"


class _Printed(Protocol):
    @property
    def stdout(self) -> Stream: ...
    @property
    def stderr(self) -> Stream: ...


def left_out(*ended: _Printed) -> Iterator[str]:
    """A sentence for each stream that was too long."""
    for one in ended:
        for name, stream in (("stdout", one.stdout), ("stderr", one.stderr)):
            if stream.left_out:
                of = f" of rank {one.rank}" if isinstance(one, RankOutcome) and len(ended) > 1 else ""
                yield (
                    f"{name}{of} was too long: {stream.left_out} bytes before its end are left out (max_output_bytes "
                    "in the settings of the server); write such output into a file"
                )
