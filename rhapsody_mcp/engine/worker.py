"""A long-lived process that runs native functions, one at a time.

    python -P -m rhapsody_mcp.engine.worker CONFIG

The main thread runs them, so that a signal can interrupt one; a second thread listens for interrupts. A supervisor has
given it the files that stdout and stderr are.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import msgspec

from rhapsody_mcp.engine.call import Loop, perform
from rhapsody_mcp.engine.link import Link
from rhapsody_mcp.engine.output import collect
from rhapsody_mcp.engine.processes import adopt_orphans, end, has_children, own_descendants, reap
from rhapsody_mcp.engine.starts import FOLDER_GONE, NOT_NOTED, note_start
from rhapsody_mcp.engine.wire import (
    Finished,
    FromWorker,
    Interrupt,
    Listening,
    Result,
    Revoked,
    Run,
    Started,
    Up,
    WorkerConfig,
)
from rhapsody_mcp.model.states import Cause

__all__ = ["Interrupted", "main"]

_INTERRUPT = signal.SIGRTMIN + 6 if sys.platform == "linux" else signal.SIGUSR2
_REMEMBERED = 10_000


class Interrupted(BaseException):
    """Raised inside a function that is canceled or whose time is up."""


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


def main() -> None:
    path = Path(sys.argv[1])
    config = msgspec.msgpack.decode(path.read_bytes(), type=WorkerConfig)
    path.unlink()
    adopt_orphans()
    os.chdir(config.cwd if os.path.isdir(config.cwd) else "/")
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    _run_worker(config, [os.dup(descriptor) for descriptor in (1, 2)])


def _run_worker(config: WorkerConfig, files: Sequence[int]) -> None:
    """Serve the backend at `config.address` until the process is ended from outside, or an interrupt has cut an import
    off. What functions write to stdout and stderr goes through these files."""
    turn = _Turn()
    signal.signal(_INTERRUPT, lambda number, frame: _raise(turn, number, frame))
    threading.Thread(target=_listen, args=(config, turn, threading.get_ident()), daemon=True).start()
    backend: Link[Run] = Link(config.address, Run)
    backend.send(Up(config.worker))
    with suppress(EOFError, ConnectionError):
        _serve(backend, turn, config, files)


def _serve(backend: Link[Run], turn: _Turn, config: WorkerConfig, files: Sequence[int]) -> None:
    loop = Loop()
    waiting: deque[Run] = deque()
    unsent: list[FromWorker] = []
    while True:
        while not waiting:
            if not backend.ready():
                _send(backend, unsent)
            waiting.extend(backend.receive())
        run = waiting.popleft()
        if not turn.begin(run.uid):
            continue
        started = time.time()
        unsent.append(Started(run.uid, started))
        _send(backend, unsent)
        finished, loop = _run(run, loop, turn, started, config, files)
        unsent.append(finished)
        if turn.cut_import:
            _send(backend, unsent)
            return


def _run(
    run: Run, loop: Loop, turn: _Turn, started: float, config: WorkerConfig, files: Sequence[int]
) -> tuple[Finished, Loop]:
    interrupted, caps = False, config.caps
    try:
        try:
            if _is_in(config.cwd):
                note_start(run.folder, run.uid, run.attempt)
                result = perform(run.call, run.bindings, run.folder, loop, caps.result_bytes)
            else:
                result = Result(None, Cause.INVALID, FOLDER_GONE.format(config.cwd))
        finally:
            interrupted = turn.over()
    except OSError as error:  # the note's: no other of its kind leaves a function
        result = Result(None, Cause.LOST, NOT_NOTED.format(error))
    except BaseException as error:  # Interrupted, KeyboardInterrupt, GeneratorExit: the worker goes on
        interrupted = turn.over() or interrupted or isinstance(error, Interrupted)
        result = Result(None, Cause.ERROR, type(error).__name__)
        loop = Loop()
    if has_children():  # the function left processes behind
        end(own_descendants)
        reap()
    _flush(sys.stdout)
    _flush(sys.stderr)
    stdout, stderr = (collect(file, run.folder, caps.output_bytes) for file in files)
    return Finished(run.uid, started, time.time(), result, stdout, stderr, interrupted), loop


def _is_in(folder: str) -> bool:
    """Whether this process could go there: an earlier task may have left it, and the folder may be gone."""
    try:
        os.chdir(folder)
    except OSError:
        return False
    return True


def _flush(stream: object) -> None:
    try:
        stream.flush()  # type: ignore[attr-defined]
    except Exception:  # the function may have closed or replaced it
        return


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
    backend.send(Listening(config.worker))
    with suppress(EOFError, ConnectionError):
        while True:
            for message in backend.receive():
                if turn.interrupt(message, main):
                    backend.send(Revoked(message.uid))


def _send(backend: Link[Run], messages: list[FromWorker]) -> None:
    if messages:
        backend.send(*messages)
        messages.clear()


if __name__ == "__main__":
    main()
