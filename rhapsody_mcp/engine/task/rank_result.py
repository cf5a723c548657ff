"""What came of one rank of a task: its value, its output, and why it failed."""

from __future__ import annotations

import codecs
import marshal
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from rhapsody_mcp.engine.messages import FunctionResult
from rhapsody_mcp.engine.task.output import move_stream, write_file, write_pieces
from rhapsody_mcp.engine.task.output_files import STREAMS
from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.specs import Call, TaskRun
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import INLINE_BYTES, PREVIEW_CHARS, Stream, Value

__all__ = ["RankEnd", "how_it_ended", "rank_end"]


class RankEnd(NamedTuple):
    """A rank's outcome and its times, seconds since the epoch.

    `left_running` counts the processes that it had started and not waited for; they were ended with it. `mpi_alone` is
    as in a Result.
    """

    outcome: RankOutcome
    started: float | None
    ended: float
    left_running: int = 0
    mpi_alone: bool = False


class _Left(NamedTuple):
    """What its supervisor left in a file. `problem` is "invalid", "lost", or empty where its program ran."""

    problem: str
    words: str
    pid: int
    code: int | None
    started: float
    ended: float
    left_running: int


def rank_end(path: str, task_run: TaskRun, rank: int, most_output: int | None) -> RankEnd | None:
    """What the supervisor with this path left, which is gone afterwards; None where it was killed. Raises OSError where
    its output or its value cannot be kept."""
    try:
        left = _Left(*marshal.loads(Path(f"{path}.outcome").read_bytes()))
    except (FileNotFoundError, EOFError, ValueError):  # not written, or not to its end
        return None
    try:
        return _end(left, path, task_run, rank, most_output)
    finally:
        for suffix in ("outcome", "result", *STREAMS):
            with suppress(FileNotFoundError):
                os.unlink(f"{path}.{suffix}")


def _end(left: _Left, path: str, task_run: TaskRun, rank: int, most: int | None) -> RankEnd:
    result, value, stdout, stderr = _result(left, path, task_run), None, Stream(), Stream()
    if os.path.exists(f"{path}.out"):
        with open(f"{path}.out", "rb") as printed:
            stdout, stderr = (move_stream(f"{path}.{suffix}", task_run.results_folder, most) for suffix in STREAMS)
            if result.cause is None and result.value is None:
                value = _printed_value(printed, stdout, task_run.results_folder)
    outcome = RankOutcome(
        rank=rank,
        host=socket.gethostname(),
        pid=left.pid,
        exit_code=None if result.cause is Cause.INVALID else left.code,
        value=value or result.value,
        stdout=stdout,
        stderr=stderr,
        cause=result.cause,
        error=result.error,
        traceback=result.traceback,
        exception=result.exception,
    )
    started = None if result.cause is Cause.INVALID or not left.started else left.started
    return RankEnd(outcome, started, left.ended, left.left_running, result.mpi_alone)


def _result(left: _Left, path: str, task_run: TaskRun) -> FunctionResult:
    if left.problem:
        return FunctionResult(None, Cause(left.problem), left.words)
    with suppress(FileNotFoundError):
        return msgspec.msgpack.decode(Path(f"{path}.result").read_bytes(), type=FunctionResult)
    code = left.code or 0
    if isinstance(task_run.spec.work, Call):
        return FunctionResult(None, Cause.CRASHED, f"its process {how_it_ended(code)} before the function returned.")
    if code < 0:
        return FunctionResult(None, Cause.CRASHED, f"the program {how_it_ended(code)}.")
    if code > 0:
        return FunctionResult(None, Cause.EXIT_CODE, f"exit code {code}{_last_words(f'{path}.err')}")
    return FunctionResult()


def _last_words(path: str) -> str:
    """The last line of stderr, which often says why."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
        lines = file.read(_LAST_BYTES).decode("utf-8", "replace").split("\n")
    words = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {words[:500]}" if words else "; it wrote nothing to stderr"


_LAST_BYTES = 2000


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    hint = " (so does the kernel when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


# --- the value of a program


def _printed_value(printed: BinaryIO, stdout: Stream, folder: str) -> Value:
    """Its standard output without outer white space, as bytes where it is not UTF-8; of one that was too long, what is
    left of it. No more than a piece of it is in memory at a time."""
    if stdout.file is not None:
        with open(stdout.file, "rb") as kept:
            return _long(kept, folder)
    return _short(stdout.text.encode() if stdout.left_out else printed.read(INLINE_BYTES), folder)


def _short(data: bytes, folder: str) -> Value:
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        return Value("pickle", "bytes", len(data), pickle.dumps(data), None, len(data), _BINARY.format(len(data)))
    encoded = msgspec.json.encode(text)
    if len(encoded) <= INLINE_BYTES:
        return Value("json", "str", len(encoded), encoded, length=len(text))
    return Value("json", "str", len(encoded), None, write_file(encoded, folder), len(text), text[:PREVIEW_CHARS])


def _long(file: BinaryIO, folder: str) -> Value:
    text = _Text(file)
    try:
        path = write_pieces(text.pieces(), folder)
    except UnicodeDecodeError:
        size = file.seek(0, os.SEEK_END)
        path = write_pieces(_pickle_of_bytes(file, size), folder)
        return Value("pickle", "bytes", os.path.getsize(path), None, path, size, _BINARY.format(size))
    size = os.path.getsize(path)
    if size > INLINE_BYTES:
        return Value("json", "str", size, None, path, text.length, text.preview)
    data = Path(path).read_bytes()  # nearly all of it was white space
    os.unlink(path)
    return Value("json", "str", size, data, length=text.length)


_BINARY = "{} bytes that are not UTF-8 text"


class _Text:
    """A file as a JSON string without outer white space, and what is known of it when all its pieces were read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.length, self.preview = 0, ""

    def pieces(self) -> Iterator[bytes]:
        """Raises UnicodeDecodeError where it is not UTF-8."""
        decoder, spaces = codecs.getincrementaldecoder("utf-8")(), list[str]()
        self._file.seek(0)
        yield b'"'
        while True:
            data = self._file.read(_PIECE_BYTES)
            text = decoder.decode(data, final=not data)
            if not self.length:
                text = text.lstrip()
            if words := text.rstrip():
                yield from (self._piece(space) for space in spaces)
                yield self._piece(words)
                spaces.clear()
            spaces.append(text[len(words) :])  # the end's, unless words follow
            if not data:
                yield b'"'
                return

    def _piece(self, text: str) -> bytes:
        self.length += len(text)
        self.preview += text[: PREVIEW_CHARS - len(self.preview)]
        return msgspec.json.encode(text)[1:-1]


_PIECE_BYTES = 1024 * 1024


def _pickle_of_bytes(file: BinaryIO, size: int) -> Iterator[bytes]:
    """What pickle.dumps makes of a bytes object, without having all of it in memory."""
    yield pickle.PROTO + b"\x04" + pickle.BINBYTES8 + size.to_bytes(8, "little")
    file.seek(0)
    yield from iter(partial(file.read, _PIECE_BYTES), b"")
    yield pickle.STOP
