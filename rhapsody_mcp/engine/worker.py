"""A long-lived process that runs native functions, one at a time.

    python -P -m rhapsody_mcp.engine.worker CONFIG

The main thread runs them, so that a signal can interrupt one; a second thread listens for interrupts. Its supervisor
writes what comes through the pipes of stdout and stderr into the files CONFIG.out and CONFIG.err, less the suffix of
CONFIG. A function finds the process as the one before did; where that cannot be, the worker ends, and another takes its
place.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import cloudpickle.cloudpickle
import msgspec

from rhapsody_mcp.engine.isolation import c_streams
from rhapsody_mcp.engine.isolation.edited_modules import EditedModules, keep_no_bytecode_of_new_files
from rhapsody_mcp.engine.isolation.process_state import ProcessState
from rhapsody_mcp.engine.isolation.sources import Sources
from rhapsody_mcp.engine.messages import (
    FromWorker,
    FunctionFinished,
    FunctionResult,
    Interrupt,
    RunFunction,
    TaskRevoked,
    TaskStarted,
    WorkerConfig,
    WorkerListening,
    WorkerReady,
)
from rhapsody_mcp.engine.process.tree import adopt_orphans, arguments, end, has_children, own_descendants, reap
from rhapsody_mcp.engine.task.error_text import Interrupted
from rhapsody_mcp.engine.task.function_call import can_start_threads, perform
from rhapsody_mcp.engine.task.function_output import Printed
from rhapsody_mcp.engine.task.start_log import FOLDER_GONE, NOT_NOTED, note_start
from rhapsody_mcp.engine.transport import Link
from rhapsody_mcp.model.states import Cause

__all__ = ["main"]

_INTERRUPT = signal.SIGRTMIN + 6 if sys.platform == "linux" else signal.SIGUSR2
_REMEMBERED = 10_000


class _Turn:
    """Which task runs, shared by the two threads: an interrupt reaches that task or none."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current = ""
        self.interrupted = ""
        self.cut_import = False
        """Whether an interrupt fell into an import: Python does not make such a module whole again."""
        self.revoked: dict[str, int] = {}
        """How often: a task that was taken back may have been sent here again, and taken back again."""
        self._started: set[str] = set()
        self._order: deque[str] = deque()

    def begin(self, uid: str) -> bool:
        """False where the task was revoked before it could start."""
        with self.lock:
            if often := self.revoked.pop(uid, 0):
                if often > 1:
                    self.revoked[uid] = often - 1
                return False
            self.current = uid
            self._started.add(uid)
            self._order.append(uid)
            if len(self._order) > _REMEMBERED:
                self._started.discard(self._order.popleft())
            return True

    def over(self) -> bool:
        """No interrupt reaches the task any more; True where one has."""
        with self.lock:
            uid, self.current = self.current, ""
            return bool(uid) and self.interrupted == uid

    def interrupt(self, message: Interrupt, main: int) -> bool:
        """True where the task was revoked, because it has not started."""
        with self.lock:
            if self.current == message.uid and message.running:
                self.interrupted = message.uid
                signal.pthread_kill(main, _INTERRUPT)
            if message.uid in self._started:
                return False
            self.revoked[message.uid] = self.revoked.get(message.uid, 0) + 1
            return True


def main() -> NoReturn:
    path = Path(sys.argv[1])
    config = msgspec.msgpack.decode(path.read_bytes(), type=WorkerConfig)
    path.unlink()
    adopt_orphans()
    os.chdir(config.cwd if os.path.isdir(config.cwd) else "/")
    sys.path.insert(0, config.cwd)
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    keep_no_bytecode_of_new_files()
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # our thread, not theirs
    c_streams.buffer_lines()
    with suppress(EOFError, ConnectionError):
        _Worker(config, path).serve()
    os._exit(0)  # a thread that a function left may never end


class _Worker:
    """Serves the backend at `config.address` until the process is ended from outside, or is not as it was."""

    def __init__(self, config: WorkerConfig, path: Path) -> None:
        """`path` is that of the configuration."""
        self.config, self.turn = config, _Turn()
        signal.signal(_INTERRUPT, lambda number, frame: _raise(self.turn, number, frame))
        threading.Thread(target=_listen, args=(config, self.turn, threading.get_ident()), daemon=True).start()
        self.sources, self.edited = Sources(str(path.parent / "sources")), EditedModules()
        self.printed = Printed(path)
        self.state = ProcessState()
        self.threads = _thread._count()
        self.backend = self._connect()

    def _connect(self) -> Link[RunFunction]:
        backend: Link[RunFunction] = Link(self.config.address, RunFunction)
        backend.send(WorkerReady(self.config.worker))
        return backend

    def serve(self) -> None:
        waiting: deque[RunFunction] = deque()
        unsent: list[FromWorker] = []
        is_whole = True
        while is_whole:
            while not waiting:
                if not self.backend.ready():
                    self._send(unsent)
                waiting.extend(self.backend.receive())
                self.edited.drop()
            if _thread._count() > self.threads:  # one that began after its function had ended
                break
            run = waiting.popleft()
            if not self.turn.begin(run.uid):
                continue
            started = time.time()
            unsent.append(TaskStarted(run.uid, started))
            self._send(unsent)
            finished, is_whole = self._run(run, started)
            unsent.append(finished)
        self._send(unsent)

    def _send(self, messages: list[FromWorker]) -> None:
        """Ends this process where a function has closed the connection, once they are sent."""
        if not messages:
            return
        try:
            self.backend.send(*messages)
        except ConnectionError:
            raise
        except OSError:
            self._connect().send(*messages)
            os._exit(0)
        messages.clear()

    def _run(self, run: RunFunction, started: float) -> tuple[FunctionFinished, bool]:
        """What came of it, and whether this process can run another one."""
        result, interrupted = self._perform(run)
        ended = time.time()
        took_long = ended - started > _START_S
        children = _end_children() if took_long else []
        is_whole = self._has_no_threads() and not children and not self.turn.cut_import  # modules may know of them
        self.state.flush()
        c_streams.flush(look=took_long)
        is_whole = self.state.restore() and is_whole
        stdout, stderr = self.printed.collect(run.results_folder, self.config.caps.output_bytes)
        self._forget()
        is_whole = is_whole and not self.printed.is_closed and can_start_threads()
        return FunctionFinished(
            run.uid, started, ended, result, stdout, stderr, interrupted, children.count(True)
        ), is_whole

    def _perform(self, run: RunFunction) -> tuple[FunctionResult, bool]:
        interrupted = False
        try:
            try:
                result = self._attempt(run)
            finally:
                interrupted = self.turn.over()
        except Interrupted:
            self.turn.over()
            return FunctionResult(None, Cause.ERROR, "interrupted"), True
        return result, interrupted

    def _attempt(self, run: RunFunction) -> FunctionResult:
        if not _is_in(self.config.cwd):
            return FunctionResult(None, Cause.INVALID, FOLDER_GONE.format(self.config.cwd))
        try:
            note_start(run.results_folder, run.uid, run.attempt)
        except OSError as error:
            return FunctionResult(None, Cause.LOST, NOT_NOTED.format(error))
        return perform(run.call, run.bindings, run.results_folder, self.sources, self.config.caps)

    def _has_no_threads(self) -> bool:
        """Whether none of the function's is left. One that was joined may not be gone yet."""
        if _thread._count() <= self.threads:
            return True
        deadline = time.monotonic() + _ENDING_S
        while _thread._count() > self.threads and time.monotonic() < deadline:
            time.sleep(0.001)
        return _thread._count() <= self.threads

    def _forget(self) -> None:
        """Classes that came with the function: the next one brings its own."""
        self.sources.forget()
        self.edited.note()
        if _TRACKED_CLASSES.data:
            _TRACKED_CLASSES.clear()


def _end_children() -> list[bool]:
    """End the processes that the function left; for each, whether the function itself had started it."""
    if not has_children():
        return []
    reap()
    left = [not any(_HELPER in argument for argument in arguments(pid)) for pid in own_descendants()]
    if left:
        end(own_descendants)
        reap()
    return left


_HELPER = b"from multiprocessing."
"""Python's own start with it: of shared memory, and of the forkserver."""
_START_S = 0.00005
"""No process starts, and no library is loaded, in less: what ran shorter need not be looked at for such."""
_ENDING_S = 0.1
_TRACKED_CLASSES = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID


def _is_in(folder: str) -> bool:
    """Whether this process could go there: an earlier task may have left it, and the folder may be gone."""
    try:
        os.chdir(folder)
    except OSError:
        return False
    return True


def _raise(turn: _Turn, _number: int, frame: FrameType | None) -> None:
    if turn.current and turn.current == turn.interrupted:
        turn.cut_import = turn.cut_import or _imports(frame)
        raise Interrupted


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way."""
    while frame is not None and frame.f_code.co_filename != _IMPORTING:
        frame = frame.f_back
    return frame is not None


_IMPORTING = "<frozen importlib._bootstrap>"


def _listen(config: WorkerConfig, turn: _Turn, main: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {_INTERRUPT})
    backend: Link[Interrupt] = Link(config.address, Interrupt)
    backend.send(WorkerListening(config.worker))
    with suppress(EOFError, OSError):
        while True:
            for message in backend.receive():
                if turn.interrupt(message, main):
                    backend.send(TaskRevoked(message.uid))


if __name__ == "__main__":
    main()
