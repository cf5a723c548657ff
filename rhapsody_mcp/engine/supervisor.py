"""The process that an engine places: it runs one rank of a task, or a worker, as its child, and owns the tree.

    python -m rhapsody_mcp.engine.supervisor CONFIG

TERM ends the child's whole tree, politely first, then with KILL; the end of the keeper ends it at once. When this
process has ended nothing that it started is left, and for a rank the file CONFIG.outcome says what came of it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

import msgspec

from rhapsody_mcp.engine.output import keep_small, move_stream, open_output, write_file
from rhapsody_mcp.engine.processes import adopt_orphans, descendants, end, open_lifeline, outlives, reap
from rhapsody_mcp.engine.starts import NOT_NOTED, note_start
from rhapsody_mcp.engine.wire import FOLDER_GONE, PlaceConfig, Result
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.specs import Call, Command, Template
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import INLINE_BYTES, NOTHING, PREVIEW_CHARS, Ref, Stream, Value, follow, load

__all__ = ["GRACE_S", "OWNER_GONE", "RankEnd", "how_it_ended"]

_STREAMS = ("out", "err")
GRACE_S = 2
"""From TERM to KILL."""
_ABOUT_TO_END_S = 0.1
OWNER_GONE = 86
"""The exit code of a supervisor whose keeper has ended."""


class RankEnd(msgspec.Struct, frozen=True):
    """What a supervisor leaves in a file: the rank's outcome and its times, seconds since the epoch.

    `left_running` counts the processes that it had started and not waited for; they were ended with it.
    """

    outcome: RankOutcome
    started: float | None
    ended: float
    left_running: int = 0


def main() -> None:
    path = Path(sys.argv[1])
    config = msgspec.msgpack.decode(path.read_bytes(), type=PlaceConfig)
    path.unlink()
    adopt_orphans()
    os.chdir(config.cwd if os.path.isdir(config.cwd) else "/")
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    if config.worker:
        os._exit(_exit_status(_work(config, path)))
    rank_end = _Rank(config, str(path)).run()
    (temporary := path.with_suffix(".tmp")).write_bytes(msgspec.msgpack.encode(rank_end))
    temporary.rename(f"{path}.outcome")
    os._exit(0)


def _write_pids(path: Path, *children: int) -> None:
    """Tell the host which processes to look after."""
    with suppress(OSError):
        (temporary := path.with_suffix(".tmp")).write_text(" ".join(map(str, (os.getpid(), *children))))
        temporary.rename(f"{path}.pids")


def _work(config: PlaceConfig, path: Path) -> int:
    """Its exit code."""
    files = [open_output(f"{path}.{suffix}") for suffix in _STREAMS]
    for suffix in _STREAMS:
        os.unlink(f"{path}.{suffix}")

    def started(pid: int) -> None:
        _write_pids(path, pid)
        _keep_small(files, config)

    return _supervise(lambda: _worker(config, files), started)[0]


def _worker(config: PlaceConfig, files: Sequence[int]) -> NoReturn:
    from rhapsody_mcp.engine.worker import run_worker

    run_worker(config, files)
    os._exit(0)


def _keep_small(files: Sequence[int], config: PlaceConfig) -> None:
    if (most := config.caps.output_bytes) is not None:
        threading.Thread(target=keep_small, args=(files, most), daemon=True).start()


def _exit_status(code: int) -> int:
    return code if code >= 0 else 128 - code


# --- the tree


def _supervise(child: Callable[[], NoReturn], started: Callable[[int], None] = lambda _: None) -> tuple[int, int]:
    """Run `child` in a forked process that leads a session of its own, until it and all its descendants have
    ended; its exit code, negative for a signal, and how many processes it left running."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _finish(child)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGALRM, _kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    started(pid)
    if not outlives(pid, open_lifeline()):
        end(lambda: descendants(os.getpid()))
        os._exit(OWNER_GONE)
    _, status = os.waitpid(pid, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(0)
    left_running = _left_running()
    end(lambda: descendants(os.getpid()))
    return os.waitstatus_to_exitcode(status), left_running


def _left_running() -> int:
    """How many processes the child left that are not about to end by themselves."""
    deadline = time.monotonic() + _ABOUT_TO_END_S
    while (count := len(descendants(os.getpid()))) and time.monotonic() < deadline:
        reap()
        time.sleep(0.005)
    return count


def _finish(child: Callable[[], NoReturn]) -> NoReturn:
    try:
        child()
    except BaseException:  # nothing of the parent's may run in the child
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    _signal_tree(signal.SIGTERM)
    signal.alarm(GRACE_S)


def _kill(_number: int, _frame: FrameType | None) -> None:
    _signal_tree(signal.SIGKILL)


def _signal_tree(number: int) -> None:
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


# --- one rank of a task


class _Rank:
    """Runs a function or a program as its task's template says, and finds out what came of it."""

    def __init__(self, config: PlaceConfig, path: str) -> None:
        assert config.order is not None
        self.config, self.path, self.order = config, path, config.order
        self.spec = config.order.spec
        self.template: Template = self.spec.layout.templates[config.rank]
        self.started: float | None = None
        self.pid = 0
        self.files: list[int] = []

    def run(self) -> RankEnd:
        try:
            child = self._prepare()
        except (InvalidTask, OSError) as error:
            return self._end(None, Result(None, Cause.INVALID, str(error)))
        try:
            note_start(self.order.folder, self.spec.uid, self.order.attempt)
        except OSError as error:
            return self._end(None, Result(None, Cause.LOST, NOT_NOTED.format(error)))
        code, left_running = _supervise(child, self._started)
        return msgspec.structs.replace(self._end(code, self._result(code)), left_running=left_running)

    def _prepare(self) -> Callable[[], NoReturn]:
        env = self._environment()
        cwd = self._folder()
        if self.config.sets_affinity and self.template.cpu_affinity:
            os.sched_setaffinity(0, self.template.cpu_affinity)
        self.files = [open_output(f"{self.path}.{suffix}") for suffix in _STREAMS]
        work = self.spec.work
        if isinstance(work, Command):
            program = _find_program(work.executable, env, cwd)
            arguments = [self._argument(argument) for argument in work.arguments]
            return lambda: self._exec(program, [work.executable, *arguments], env, cwd)
        assert isinstance(work, Call)
        return lambda: self._call(work, env, cwd)

    def _folder(self) -> str:
        """Where it runs; a relative cwd begins in the folder of its session."""
        given, session = self.template.cwd, self.config.cwd
        if not os.path.isdir(session) and not os.path.isabs(given or ""):
            raise InvalidTask(FOLDER_GONE.format(session))
        cwd = os.path.join(session, given or "")
        if not os.path.isdir(cwd):
            there = f", which is {cwd} here," if cwd != given else ""
            raise InvalidTask(f"cwd {given!r}{there} is not a folder on {socket.gethostname()}.")
        return cwd

    def _environment(self) -> dict[str, str]:
        layout = self.spec.layout
        env = {**os.environ, "RHAPSODY_RANK": str(self.config.rank), "RHAPSODY_RANKS": str(layout.ranks)}
        if self.config.sets_affinity and self.template.gpu_affinity:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.template.gpu_affinity))
        for name, value in self.template.env.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def _argument(self, argument: str | Ref) -> str:
        if isinstance(argument, str):
            return argument
        bound = self.order.bindings[argument.uid]
        value = None if bound == NOTHING else follow(load(bound), argument.path)
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()

    def _redirect(self, cwd: str) -> None:
        for descriptor, file in zip((1, 2), self.files, strict=True):
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)

    def _exec(self, program: str, arguments: list[str], env: dict[str, str], cwd: str) -> NoReturn:
        self._redirect(cwd)
        try:
            os.execve(program, arguments, env)
        except OSError as error:
            self._leave(Result(None, Cause.INVALID, f"{program} cannot be run: {error.strerror}."))
            os._exit(126)

    def _call(self, call: Call, env: dict[str, str], cwd: str) -> NoReturn:
        import asyncio

        from rhapsody_mcp.engine.call import perform

        self._redirect(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.path.insert(0, cwd)
        result = perform(call, self.order.bindings, self.order.folder, asyncio.Runner(), self.config.caps.result_bytes)
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(result)
        os._exit(0 if result.cause is None else 1)

    def _leave(self, result: Result) -> None:
        Path(f"{self.path}.part").write_bytes(msgspec.msgpack.encode(result))
        os.rename(f"{self.path}.part", f"{self.path}.result")

    def _started(self, pid: int) -> None:
        _write_pids(Path(self.path))
        _keep_small(self.files, self.config)
        self.pid, self.started = pid, time.time()
        if self.config.started:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as events:
                events.sendto(msgspec.msgpack.encode((self.spec.uid, self.started)), self.config.started)

    def _result(self, code: int) -> Result:
        left = Path(f"{self.path}.result")
        if left.exists():
            result = msgspec.msgpack.decode(left.read_bytes(), type=Result)
            left.unlink()
            return result
        if isinstance(self.spec.work, Call):
            return Result(None, Cause.CRASHED, f"its process {how_it_ended(code)} before the function returned.")
        if code < 0:
            return Result(None, Cause.CRASHED, f"the program {how_it_ended(code)}.")
        if code > 0:
            return Result(None, Cause.EXIT_CODE, f"exit code {code}{self._last_words()}")
        return Result()

    def _last_words(self) -> str:
        """The last line of stderr, which often says why."""
        file = self.files[1]
        end = os.pread(file, 2000, max(0, os.fstat(file).st_size - 2000))
        lines = end.decode("utf-8", "replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {words[:500]}" if words else "; it wrote nothing to stderr"

    def _end(self, code: int | None, result: Result) -> RankEnd:
        stdout, stderr = self._stream("out"), self._stream("err")
        value = result.value
        if result.cause is None and value is None:
            value = self._printed(stdout)
        outcome = RankOutcome(
            rank=self.config.rank,
            host=socket.gethostname(),
            pid=self.pid,
            exit_code=code,
            value=value,
            stdout=stdout,
            stderr=stderr,
            cause=result.cause,
            error=result.error,
            traceback=result.traceback,
        )
        return RankEnd(outcome, None if result.cause is Cause.INVALID else self.started, time.time())

    def _stream(self, suffix: str) -> Stream:
        path = f"{self.path}.{suffix}"
        if not os.path.exists(path):
            return Stream()
        return move_stream(path, self.order.folder, self.config.caps.output_bytes)

    def _printed(self, stdout: Stream) -> Value:
        """A program's value: its standard output without outer white space, as bytes where it is not UTF-8; of one that
        was too long, what is left of it."""
        if stdout.file is not None:
            data = Path(stdout.file).read_bytes()
        else:
            data = stdout.text.encode() if stdout.left_out else os.pread(self.files[0], INLINE_BYTES, 0)
        try:
            text = data.decode().strip()
        except UnicodeDecodeError:
            preview = f"{len(data)} bytes that are not UTF-8 text"
            return self._value("pickle", "bytes", pickle.dumps(data), len(data), preview)
        return self._value("json", "str", msgspec.json.encode(text), len(text), text[:PREVIEW_CHARS])

    def _value(self, form: Literal["json", "pickle"], kind: str, data: bytes, length: int, preview: str) -> Value:
        if len(data) <= INLINE_BYTES:
            return Value(form, kind, len(data), data, length=length, preview="" if form == "json" else preview)
        return Value(form, kind, len(data), None, write_file(data, self.order.folder), length, preview)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    hint = " (so does the kernel when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _find_program(name: str, env: dict[str, str], cwd: str) -> str:
    """The program's path; raises InvalidTask where there is none that can be run."""
    path = os.path.join(cwd, name) if os.sep in name else shutil.which(name, path=env.get("PATH"))
    if path is None:
        raise InvalidTask(f"no program {name!r} on PATH of {socket.gethostname()}; give its full path.")
    if not os.path.exists(path):
        raise InvalidTask(f"executable {name!r} does not exist on {socket.gethostname()}.")
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise InvalidTask(f"{path!r} is not a program that can be run; is it executable (chmod +x)?")
    return path


if __name__ == "__main__":
    main()
