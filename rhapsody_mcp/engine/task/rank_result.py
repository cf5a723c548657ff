"""The result of one rank of a task: value, output, and error."""

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
from typing import BinaryIO, NamedTuple

import msgspec

from rhapsody_mcp.engine.messages import FunctionResult
from rhapsody_mcp.engine.software.containers import did_not_start
from rhapsody_mcp.engine.software.setup_lines import SETUP, failed_line
from rhapsody_mcp.engine.task.json_output import NotJson, json_value
from rhapsody_mcp.engine.task.output import move_stream, write_file, write_pieces
from rhapsody_mcp.engine.task.output_files import STREAMS
from rhapsody_mcp.engine.views.pictures import about_bytes
from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.specs import Call, Command, TaskRun
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import INLINE_BYTES, PREVIEW_CHARS, Stream, Value

__all__ = ["RankEnd", "how_it_ended", "rank_end"]


class RankEnd(NamedTuple):
    """The outcome of a rank and its times, in seconds since the epoch.

    `left_running` counts the processes that the rank started and did not wait for; the supervisor ended them.
    `mpi_alone` has the same meaning as in FunctionResult.
    """

    outcome: RankOutcome
    started: float | None
    ended: float
    left_running: int = 0
    mpi_alone: bool = False
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0


class _SupervisorOutcome(NamedTuple):
    """The content of the outcome file of a supervisor. `problem` is "invalid" or "lost" if the program did not start,
    else empty."""

    problem: str
    message: str
    pid: int
    code: int | None
    started: float
    ended: float
    left_running: int
    cpu_s: float
    peak_memory_bytes: int


def rank_end(path: str, task_run: TaskRun, rank: int, max_output_bytes: int | None) -> RankEnd | None:
    """Collect the files of the supervisor with this path, and delete them; return None if the supervisor was killed.
    Raises OSError if the output or the value cannot be stored."""
    try:
        supervisor_outcome = _SupervisorOutcome(*marshal.loads(_content(f"{path}.outcome")))
    except (FileNotFoundError, EOFError, ValueError):  # missing or incomplete
        return None
    try:
        return _collect_end(supervisor_outcome, path, task_run, rank, max_output_bytes)
    finally:
        of_setup = (SETUP,) if task_run.spec.layout.software.setup else ()
        for suffix in ("outcome", "result", *STREAMS, *of_setup):
            with suppress(FileNotFoundError):
                os.unlink(f"{path}.{suffix}")


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _collect_end(
    supervisor_outcome: _SupervisorOutcome, path: str, task_run: TaskRun, rank: int, max_bytes: int | None
) -> RankEnd:
    result, stdout, stderr = _result(supervisor_outcome, path, task_run), Stream(), Stream()
    if os.path.exists(f"{path}.out"):
        with open(f"{path}.out", "rb") as printed:
            stdout, stderr = (move_stream(f"{path}.{suffix}", task_run.results_folder, max_bytes) for suffix in STREAMS)
            if result.cause is None and result.value is None:
                result = _printed_result(printed, stdout, task_run, rank)
    outcome = RankOutcome(
        rank=rank,
        host=socket.gethostname(),
        pid=supervisor_outcome.pid,
        exit_code=None if result.cause is Cause.INVALID else supervisor_outcome.code,
        value=result.value,
        stdout=stdout,
        stderr=stderr,
        cause=result.cause,
        error=result.error,
        traceback=result.traceback,
        exception=result.exception,
    )
    started = None if result.cause is Cause.INVALID or not supervisor_outcome.started else supervisor_outcome.started
    run = supervisor_outcome
    used = (run.cpu_s, run.peak_memory_bytes)
    return RankEnd(outcome, started, run.ended, run.left_running, result.mpi_alone, *used)


def _result(supervisor_outcome: _SupervisorOutcome, path: str, task_run: TaskRun) -> FunctionResult:
    if supervisor_outcome.problem:
        return FunctionResult(None, Cause(supervisor_outcome.problem), supervisor_outcome.message)
    with suppress(FileNotFoundError):
        return msgspec.json.decode(_content(f"{path}.result"), type=FunctionResult)
    code, software = supervisor_outcome.code or 0, task_run.spec.layout.software
    if problem := failed_line(software.setup, path, how_it_ended(code)):
        return FunctionResult(None, Cause.INVALID, problem)
    said = _stderr_excerpt(f"{path}.err") if software.container and code else "."
    if did_not_start(code, said) and software.container:
        return FunctionResult(None, Cause.INVALID, f"its container {software.container!r} did not start{said}")
    if isinstance(task_run.spec.work, Call):
        message = f"its process {how_it_ended(code)} before the function returned{said}"
        return FunctionResult(None, Cause.CRASHED, message)
    if code < 0:
        return FunctionResult(None, Cause.CRASHED, f"the program {how_it_ended(code)}.")
    if code > 0:
        return FunctionResult(None, Cause.EXIT_CODE, f"exit code {code}{_stderr_excerpt(f'{path}.err')}")
    return FunctionResult()


def _stderr_excerpt(path: str) -> str:
    """Return the last non-empty line of stderr, which often names the reason."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _EXCERPT_BYTES))
        lines = file.read(_EXCERPT_BYTES).decode("utf-8", "replace").split("\n")
    message = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {message[:500]}" if message else "; it wrote nothing to stderr"


_EXCERPT_BYTES = 2000


def how_it_ended(code: int) -> str:
    """Describe an exit code; a negative one is a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    hint = " (so does the kernel when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


# --- the value of a program


def _printed_result(printed: BinaryIO, stdout: Stream, task_run: TaskRun, rank: int) -> FunctionResult:
    """Return what a program printed as its value; of the ranks of a job, JSON is asked of the first alone."""
    work = task_run.spec.work
    if not isinstance(work, Command) or work.stdout != "json" or rank:
        return FunctionResult(_printed_value(printed, stdout, task_run.results_folder))
    try:
        return FunctionResult(json_value(printed, stdout, task_run.results_folder))
    except NotJson as error:
        return FunctionResult(None, Cause.ERROR, str(error))


def _printed_value(printed: BinaryIO, stdout: Stream, folder: str) -> Value:
    """Return stdout without surrounding white space as the value; as bytes if stdout is not UTF-8. Of stdout that was
    too long, the value is the kept part. At most one piece of stdout is in memory at a time."""
    if stdout.file is not None:
        with open(stdout.file, "rb") as kept:
            return _long_value(kept, folder)
    return _short_value(stdout.text.encode() if stdout.left_out else printed.read(INLINE_BYTES), folder)


def _short_value(data: bytes, folder: str) -> Value:
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        pickled, about = pickle.dumps(data), about_bytes(data, len(data))
        return Value("pickle", "bytes", len(data), pickled, None, len(data), about or _BINARY.format(len(data)), about)
    encoded = msgspec.json.encode(text)
    if len(encoded) <= INLINE_BYTES:
        return Value("json", "str", len(encoded), encoded, length=len(text))
    return Value("json", "str", len(encoded), None, write_file(encoded, folder), len(text), text[:PREVIEW_CHARS])


def _long_value(file: BinaryIO, folder: str) -> Value:
    text = _JsonText(file)
    try:
        path = write_pieces(text.pieces(), folder)
    except UnicodeDecodeError:
        size = file.seek(0, os.SEEK_END)
        path = write_pieces(_pickle_of_bytes(file, size), folder)
        file.seek(0)
        about = about_bytes(file.read(_PIECE_BYTES), size)
        return Value("pickle", "bytes", os.path.getsize(path), None, path, size, about or _BINARY.format(size), about)
    size = os.path.getsize(path)
    if size > INLINE_BYTES:
        return Value("json", "str", size, None, path, text.length, text.preview)
    data = _content(path)  # short without the surrounding white space
    os.unlink(path)
    return Value("json", "str", size, data, length=text.length)


_BINARY = "{} bytes that are not UTF-8 text"


class _JsonText:
    """Encodes a text file as a JSON string without surrounding white space; `length` and `preview` are complete after
    the last piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.length, self.preview = 0, ""

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the JSON string. Raises UnicodeDecodeError if the file is not UTF-8."""
        decoder, trailing_spaces = codecs.getincrementaldecoder("utf-8")(), list[str]()
        self._file.seek(0)
        yield b'"'
        while True:
            data = self._file.read(_PIECE_BYTES)
            text = decoder.decode(data, final=not data)
            if not self.length:
                text = text.lstrip()
            if stripped := text.rstrip():
                yield from (self._encode_piece(space) for space in trailing_spaces)
                yield self._encode_piece(stripped)
                trailing_spaces.clear()
            trailing_spaces.append(text[len(stripped) :])  # dropped at the end of the file, kept if text follows
            if not data:
                yield b'"'
                return

    def _encode_piece(self, text: str) -> bytes:
        self.length += len(text)
        self.preview += text[: PREVIEW_CHARS - len(self.preview)]
        return msgspec.json.encode(text)[1:-1]


_PIECE_BYTES = 1024 * 1024


def _pickle_of_bytes(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield what pickle.dumps returns for a bytes object, without having the whole object in memory."""
    yield pickle.PROTO + b"\x04" + pickle.BINBYTES8 + size.to_bytes(8, "little")
    file.seek(0)
    yield from iter(partial(file.read, _PIECE_BYTES), b"")
    yield pickle.STOP
