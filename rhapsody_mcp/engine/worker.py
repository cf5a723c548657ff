"""A long-lived process that runs functions, one at a time.

    python -P -m rhapsody_mcp.engine.worker CONFIG

The main thread runs the functions, so that a signal can interrupt a function; a second thread listens for interrupts.
The supervisor writes the data of the stdout and stderr pipes into two files: CONFIG with the suffix .out or .err. After
each function the worker restores the state of the process; if that fails, the worker ends, and the backend replaces it.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import cloudpickle.cloudpickle
import msgspec

from rhapsody_mcp.engine.isolation import c_streams
from rhapsody_mcp.engine.isolation.edited_modules import EditedModules, skip_bytecode_of_recent_sources
from rhapsody_mcp.engine.isolation.process_state import ProcessState
from rhapsody_mcp.engine.isolation.sources import Sources
from rhapsody_mcp.engine.live.progress_file import PROGRESS
from rhapsody_mcp.engine.live.progress_note import ProgressNote
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
from rhapsody_mcp.engine.task.function_output import FunctionOutput
from rhapsody_mcp.engine.task.kept_files import with_outputs
from rhapsody_mcp.engine.task.node_files import local_bindings, results_folder
from rhapsody_mcp.engine.task.start_log import FOLDER_GONE, NOT_STARTED, START_NOT_LOGGED, log_start, place_of
from rhapsody_mcp.engine.transport import Link
from rhapsody_mcp.model.states import Cause

__all__ = ["main"]

_INTERRUPT = signal.SIGRTMIN + 6 if sys.platform == "linux" else signal.SIGUSR2
_MAX_REMEMBERED = 10_000


class _CurrentTask:
    """The task that runs now, shared by the two threads: an interrupt reaches the task that it names, or none."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running_uid = ""
        self.interrupted_uid = ""
        self.interrupted_import = False
        """Whether an interrupt has hit an import: Python does not repair a module that was imported halfway."""
        self.revocations: dict[str, int] = {}
        """Task uid to the number of revocations: a revoked task may be sent here again, and revoked again."""
        self._started: set[str] = set()
        self._started_order: deque[str] = deque()

    def begin(self, uid: str) -> bool:
        """Return False if the task was revoked before it started."""
        with self.lock:
            if count := self.revocations.pop(uid, 0):
                if count > 1:
                    self.revocations[uid] = count - 1
                return False
            self.running_uid = uid
            self._started.add(uid)
            self._started_order.append(uid)
            if len(self._started_order) > _MAX_REMEMBERED:
                self._started.discard(self._started_order.popleft())
            return True

    def finish(self) -> bool:
        """Make sure that no later interrupt reaches the task; return whether an interrupt has reached it."""
        with self.lock:
            uid, self.running_uid = self.running_uid, ""
            return bool(uid) and self.interrupted_uid == uid

    def interrupt(self, message: Interrupt, main: int) -> bool:
        """Interrupt or revoke a task; return True if the task was revoked, because it had not started."""
        with self.lock:
            if self.running_uid == message.uid and message.running:
                self.interrupted_uid = message.uid
                signal.pthread_kill(main, _INTERRUPT)
            if message.uid in self._started:
                return False
            self.revocations[message.uid] = self.revocations.get(message.uid, 0) + 1
            return True


def main() -> NoReturn:
    path = Path(sys.argv[1])
    config = msgspec.msgpack.decode(path.read_bytes(), type=WorkerConfig)
    path.unlink()
    adopt_orphans()
    os.chdir(config.cwd if os.path.isdir(config.cwd) else "/")
    sys.path.insert(0, config.cwd)
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    skip_bytecode_of_recent_sources()
    # the second thread is the worker's, not the user's
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    c_streams.buffer_lines()
    with suppress(EOFError, ConnectionError):
        _Worker(config, path).serve()
    os._exit(0)  # a thread that a function left may never end


class _Worker:
    """Serves the backend at `config.address` until the process is ended, or its state cannot be restored."""

    def __init__(self, config: WorkerConfig, path: Path) -> None:
        """`path` is the path of the configuration file."""
        self.config, self.current_task = config, _CurrentTask()
        signal.signal(_INTERRUPT, lambda number, frame: _handle_interrupt_signal(self.current_task, number, frame))
        threading.Thread(target=_listen, args=(config, self.current_task, threading.get_ident()), daemon=True).start()
        self.sources, self.edited_modules = Sources(str(path.parent / "sources")), EditedModules()
        self.output = FunctionOutput(path)
        self.progress = ProgressNote(str(path.with_suffix(f".{PROGRESS}")))
        self.cpu_meter = _CpuMeter()
        self.place = place_of(str(path.with_suffix("")))
        self.state = ProcessState()
        self.threads = _thread._count()
        self.backend = self._connect()

    def _connect(self) -> Link[RunFunction]:
        backend: Link[RunFunction] = Link(self.config.address, RunFunction)
        backend.send(WorkerReady(self.config.worker))
        return backend

    def serve(self) -> None:
        queue: deque[RunFunction] = deque()
        unsent: list[FromWorker] = []
        is_reusable = True
        while is_reusable:
            while not queue:
                if not self.backend.ready():
                    self._send(unsent)
                queue.extend(self.backend.receive())
                self.edited_modules.unload_if_edited()
            if _thread._count() > self.threads:  # a thread was started after its function had ended
                break
            run = queue.popleft()
            if not self.current_task.begin(run.uid):
                continue
            started = time.time()
            unsent.append(TaskStarted(run.uid, started))
            self._send(unsent)
            finished, is_reusable = self._run(run, started)
            unsent.append(finished)
        self._send(unsent)

    def _send(self, messages: list[FromWorker]) -> None:
        """Send the messages. If a function has closed the connection, send them on a new one, and end this process."""
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
        """Run a function; return its result, and whether this process can run another function."""
        folder = results_folder(run.results_folder, self.config.link_folder)
        result, interrupted = self._perform(run, folder, started)
        ended = time.time()
        cpu_s = self.cpu_meter.read(ended - started)
        may_have_side_effects = ended - started > _MIN_SIDE_EFFECT_S
        children = _end_children() if may_have_side_effects else []
        # ended children: modules may still refer to them
        is_reusable = self._has_no_threads() and not children and not self.current_task.interrupted_import
        self.state.flush()
        c_streams.flush(find_new_libraries=may_have_side_effects)
        is_reusable = self.state.restore() and is_reusable
        stdout, stderr = self.output.collect(folder, self.config.caps.output_bytes)
        progress = self.progress.take() if self.progress.told is not None else None
        self._forget_definitions()
        is_reusable = is_reusable and not self.output.are_pipes_closed and can_start_threads()
        return FunctionFinished(
            run.uid, started, ended, result, stdout, stderr, interrupted, children.count(True), progress, cpu_s
        ), is_reusable

    def _perform(self, run: RunFunction, folder: str, started: float) -> tuple[FunctionResult, bool]:
        interrupted = False
        try:
            try:
                result = self._start_and_perform(run, folder, started)
            finally:
                interrupted = self.current_task.finish()
        except Interrupted:
            self.current_task.finish()
            return FunctionResult(None, Cause.ERROR, "interrupted"), True
        return result, interrupted

    def _start_and_perform(self, run: RunFunction, folder: str, started: float) -> FunctionResult:
        self.output.begin(run.uid)
        self.progress.current.uid = run.uid
        if not _change_directory(self.config.cwd):
            return FunctionResult(None, Cause.INVALID, FOLDER_GONE.format(self.config.cwd))
        try:
            log_start(folder, run.uid, run.attempt, self.place)
        except OSError as error:
            return FunctionResult(None, Cause.LOST, START_NOT_LOGGED.format(error))
        try:
            bindings = local_bindings(run.bindings, self.config.link_folder)
        except OSError as error:
            return FunctionResult(None, Cause.LOST, NOT_STARTED.format(error))
        if run.variables:
            with _variables(run.variables):
                result = perform(run.call, bindings, folder, self.sources, self.config.caps)
        else:
            result = perform(run.call, bindings, folder, self.sources, self.config.caps)
        max_bytes = self.config.caps.result_bytes
        return with_outputs(result, run.call.outputs, self.config.cwd, folder, max_bytes, started)

    def _has_no_threads(self) -> bool:
        """Return whether all threads of the function have ended. A joined thread may need a moment to end."""
        if _thread._count() <= self.threads:
            return True
        deadline = time.monotonic() + _THREAD_END_S
        while _thread._count() > self.threads and time.monotonic() < deadline:
            time.sleep(0.001)
        return _thread._count() <= self.threads

    def _forget_definitions(self) -> None:
        """Forget classes and modules of the function: the next function brings its own."""
        self.sources.forget()
        self.edited_modules.record_imports()
        if _TRACKED_CLASSES.data:
            _TRACKED_CLASSES.clear()


class _CpuMeter:
    """Measures the CPU seconds of functions; short ones are not worth a system call each."""

    def __init__(self) -> None:
        self._mark, self._short_s = time.process_time(), 0.0

    def read(self, took_s: float) -> float:
        """Return the CPU seconds of the function that took so long; 0.0 for a short one."""
        if took_s < _MEASURED_S:
            self._short_s += took_s
            return 0.0
        now = time.process_time()
        used, self._mark, self._short_s = now - self._mark - self._short_s, now, 0.0
        return max(0.0, used)


def _end_children() -> list[bool]:
    """End the processes that the function left; return for each whether the function itself had started it."""
    if not has_children():
        return []
    reap()
    left = [not any(_MULTIPROCESSING_HELPER in argument for argument in arguments(pid)) for pid in own_descendants()]
    if left:
        end(own_descendants)
        reap()
    return left


_MULTIPROCESSING_HELPER = b"from multiprocessing."
"""In the command line of Python's own helper processes: the resource tracker and the fork server."""
_MEASURED_S = 0.001
_MIN_SIDE_EFFECT_S = 0.00005
"""Seconds. A function that ran shorter cannot have started a process or loaded a library, so neither is checked."""
_THREAD_END_S = 0.1
_TRACKED_CLASSES = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID


@contextmanager
def _variables(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the block, and leave none for `ProcessState`, which takes longer."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


def _change_directory(folder: str) -> bool:
    """Change to the folder, which an earlier task may have left; return False if the folder is gone."""
    try:
        os.chdir(folder)
    except OSError:
        return False
    return True


def _handle_interrupt_signal(current_task: _CurrentTask, _number: int, frame: FrameType | None) -> None:
    if current_task.running_uid and current_task.running_uid == current_task.interrupted_uid:
        current_task.interrupted_import = current_task.interrupted_import or _is_importing(frame)
        raise Interrupted


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import is running in this stack."""
    while frame is not None and frame.f_code.co_filename != _IMPORTING:
        frame = frame.f_back
    return frame is not None


_IMPORTING = "<frozen importlib._bootstrap>"


def _listen(config: WorkerConfig, current_task: _CurrentTask, main: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {_INTERRUPT})
    backend: Link[Interrupt] = Link(config.address, Interrupt)
    backend.send(WorkerListening(config.worker))
    with suppress(EOFError, OSError):
        while True:
            for message in backend.receive():
                if current_task.interrupt(message, main):
                    backend.send(TaskRevoked(message.uid))


if __name__ == "__main__":
    main()
