"""Collects the output of programs, and writes files atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO, Protocol

import msgspec

from rhapsody_mcp.engine.live.printed import current_uid
from rhapsody_mcp.engine.live.progress_file import PROGRESS
from rhapsody_mcp.engine.task.output_files import CURRENT_TASK, MOVE_COUNT, STREAMS, middle
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.values import INLINE_BYTES, Stream, gap_note

__all__ = [
    *("collect", "end_part", "left_out", "move_stream", "open_part", "stopped_note", "take_output", "write_file"),
    *("printed_by_ranks", "with_printed", "write_pieces"),
]

_TAIL_BYTES = INLINE_BYTES // 4
_PIECE_BYTES = 1024 * 1024


def write_file(data: bytes, folder: str) -> str:
    """Write a new file atomically, and return its path."""
    return write_pieces([data], folder)


def write_pieces(pieces: Iterable[bytes], folder: str, suffix: str = ".value") -> str:
    """Write a new file atomically from pieces, with one piece at a time in memory, and return its path."""
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
    """Open a new file whose suffix says that it is not complete; `end_part` completes it."""
    handle, path = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    return open(path, "wb")


def end_part(part: BinaryIO, suffix: str) -> str:
    """Close a file of `open_part`, rename it, and return its new path."""
    part.close()
    path = part.name.removesuffix(".part") + suffix
    os.rename(part.name, path)
    return path


def collect(file: int, folder: str, max_bytes: int | None) -> Stream:
    """Return the content of an output file, and truncate the file to 0 bytes."""
    size = os.fstat(file).st_size
    if not size:
        return _NO_OUTPUT
    stream = _stream(file, size, folder, max_bytes)
    os.ftruncate(file, 0)
    return stream


_NO_OUTPUT = Stream()


def move_stream(path: str, folder: str, max_bytes: int | None) -> Stream:
    """Return the content of the output file at `path`, and delete or move the file."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        if INLINE_BYTES < size and (max_bytes is None or size <= max_bytes):
            with suppress(OSError):  # if the file cannot be moved, it is copied below
                return Stream(_text(_tail(file, size)), _move_file(path, folder), size)
        stream = _stream(file, size, folder, max_bytes)
    finally:
        os.close(file)
    os.unlink(path)
    return stream


def take_output(path: str, folder: str | None, max_bytes: int | None) -> tuple[Stream, Stream]:
    """Return stdout and stderr of a worker that has exited, and delete its files; empty if they were taken before, or
    without a folder."""
    stdout, stderr = _NO_OUTPUT, _NO_OUTPUT
    if folder is not None:
        stdout, stderr = (_move_stream_if_there(f"{path}.{suffix}", folder, max_bytes) for suffix in STREAMS)
    for suffix in (*STREAMS, MOVE_COUNT, CURRENT_TASK, PROGRESS):
        with suppress(FileNotFoundError):
            os.unlink(f"{path}.{suffix}")
    return stdout, stderr


def printed_by_ranks(uid: str, paths: Sequence[str], folder: str, max_bytes: int | None) -> tuple[RankOutcome, ...]:
    """Return what the ranks of a lost task had printed: their files have these paths, without the suffixes. The output
    of a worker counts for the function that it ran last."""
    if any(current_uid(path) not in ("", uid) for path in paths):
        return ()
    outputs = [take_output(path, folder, max_bytes) for path in paths]
    return tuple(RankOutcome(rank, stdout=stdout, stderr=stderr) for rank, (stdout, stderr) in enumerate(outputs))


def with_printed(outcome: Outcome, printed: Sequence[RankOutcome]) -> Outcome:
    """Return the outcome of a lost task with what its ranks had printed."""
    if not any(rank.stdout.size or rank.stderr.size for rank in printed):
        return outcome
    ranks = (
        tuple(msgspec.structs.replace(rank, cause=outcome.cause, error=outcome.error) for rank in printed)
        if printed[1:]
        else ()
    )
    with_output = msgspec.structs.replace(outcome, stdout=printed[0].stdout, stderr=printed[0].stderr, ranks=ranks)
    return msgspec.structs.replace(with_output, notes=(*outcome.notes, *left_out(with_output)))


def _move_stream_if_there(path: str, folder: str, max_bytes: int | None) -> Stream:
    try:
        return move_stream(path, folder, max_bytes)
    except OSError:
        return _NO_OUTPUT


def _move_file(path: str, folder: str) -> str:
    handle, kept = tempfile.mkstemp(dir=folder, suffix=".output")
    os.close(handle)
    try:
        os.rename(path, kept)
    except OSError:
        os.unlink(kept)
        raise
    return kept


def _stream(file: int, size: int, folder: str, max_bytes: int | None) -> Stream:
    """Return the output: inline if it is short, else in a file of `folder`. Of output longer than `max_bytes`, keep the
    beginning and the end."""
    start, end = middle(size, max_bytes) if max_bytes is not None and size > max_bytes else (size, size)
    note = gap_note(end - start) if start < end else b""
    kept = start + len(note) + size - end
    if kept <= INLINE_BYTES:
        data = b"".join([*_pieces(file, 0, start), note, *_pieces(file, end, size)])
        return Stream(_text(data), None, len(data), end - start)
    pieces = (piece for part in (_pieces(file, 0, start), [note], _pieces(file, end, size)) for piece in part)
    tail = _tail(file, size)
    try:
        return Stream(_text(tail), write_pieces(pieces, folder, ".output"), kept, end - start)
    except OSError:  # the disk is full: the task's result is worth more than its output
        data = gap_note(size - len(tail)) + tail
        return Stream(_text(data), None, len(data), size - len(tail))


def _pieces(file: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (piece := os.pread(file, min(_PIECE_BYTES, end - start), start)):
        yield piece
        start += len(piece)


def _tail(file: int, size: int) -> bytes:
    return os.pread(file, _TAIL_BYTES, max(0, size - _TAIL_BYTES))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def stopped_note(left_running: int) -> str:
    """Return a sentence on the number of processes that a task had left running."""
    return f"processes that still ran when it ended were stopped: {left_running}; it must wait for what it starts"


class _HasStreams(Protocol):
    @property
    def stdout(self) -> Stream: ...
    @property
    def stderr(self) -> Stream: ...


def left_out(*outcomes: _HasStreams) -> Iterator[str]:
    """Yield a sentence for each stream that was longer than its limit."""
    for outcome in outcomes:
        for name, stream in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
            if stream.left_out:
                of = f" of rank {outcome.rank}" if isinstance(outcome, RankOutcome) and len(outcomes) > 1 else ""
                yield (
                    f"{name}{of} was too long: {stream.left_out} bytes before its end are left out (max_output_bytes "
                    "in the settings of the server); write such output into a file"
                )
