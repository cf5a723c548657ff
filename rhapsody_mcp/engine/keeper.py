"""Keeps a program alive for as long as its owner lives, and leaves nothing of it behind.

    python -m rhapsody_mcp.engine.keeper --name NAME --log FILE [OPTIONS] -- COMMAND...

The owner starts it as the leader of a session and holds the other end of its standard input: the lifeline. When
that closes, also because the owner was killed, the command is stopped: with TERM, or (close) by closing the FIFO
that RHAPSODY_LIFELINE names, which the command watches. What is still there after the grace is killed, as is
everything that carries the command's mark, and what they left in /dev/shm; the folder of the log, too, where its
owner is gone. It ends with the command's exit code.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rhapsody_mcp.engine.process.cleanup import keeper_note, recorded_segments, write_launcher, write_segments
from rhapsody_mcp.engine.process.run_dirs import sweep
from rhapsody_mcp.engine.process.shared_memory import dragon_files, named_segments, segments_of, unlink_unused
from rhapsody_mcp.engine.process.tree import (
    ENGINE,
    LIFELINE,
    adopt_orphans,
    child_ends_first,
    descendants,
    end,
    group,
    marked,
)

_LOOK_S = 0.25
_LOOKS = 4
"""So often after the files in /dev/shm have changed: a new one is mapped a moment after it is made."""


def main() -> int:
    options = _options()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark, folder = options.mark or os.urandom(8).hex(), Path(options.log).parent
    adopt_orphans()
    with keeper_note(folder, mark), _lifeline(folder / f"{mark}.lifeline") as writer:
        command = _start(options, mark)
        write_launcher(folder, mark, command.pid)
        signal.signal(signal.SIGTERM, lambda *_: os.close(0))
        with _noting_segments(folder, mark, command.pid) as note:
            if not child_ends_first(command.pid, 0):
                note()
                _stop(command, options.stop, options.grace, writer)
            note()
            _kill_group(command.pid)
            code = command.wait()
            end(lambda: {*marked(ENGINE, mark), *_engine(command.pid)})
        unlink_unused(recorded_segments(folder, mark) | dragon_files(command.pid))
    sweep(folder)
    return code if code >= 0 else 128 - code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="keeper")
    parser.add_argument("--name", required=True, help="what ps shows")
    parser.add_argument("--log", required=True)
    parser.add_argument("--mark", help="the value of RHAPSODY_ENGINE in the command's environment")
    parser.add_argument("--stop", choices=["term", "close"], default="term")
    parser.add_argument("--grace", type=float, default=8.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return options


@contextmanager
def _lifeline(path: Path) -> Iterator[int]:
    """The writing end of a new FIFO."""
    os.mkfifo(path, 0o600)
    try:
        yield os.open(path, os.O_RDWR | os.O_CLOEXEC)
    finally:
        path.unlink(missing_ok=True)


def _engine(leader: int) -> set[int]:
    return {*group(leader), *descendants(os.getpid())}


@contextmanager
def _noting_segments(folder: Path, mark: str, leader: int) -> Iterator[Callable[[], None]]:
    """Record the files in /dev/shm that the engine uses, again and again: the last process of the engine may not remove
    them, and after its end only this record names them. Gives a function that records them at once."""
    noted: set[str] = set()
    lock, over = threading.Lock(), threading.Event()

    def note() -> None:
        with lock:
            if not (segments := segments_of(_engine(leader))) <= noted:
                noted.update(segments)
                write_segments(folder, mark, noted)

    def watch() -> None:
        seen, looks = set[str](), 0
        while not over.wait(_LOOK_S):
            looks = looks - 1 if (there := named_segments()) == seen else _LOOKS
            seen = there
            if looks > 0:
                note()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield note
    finally:
        over.set()
        watcher.join()


def _start(options: argparse.Namespace, mark: str) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own; the session stays the keeper's, because Dragon's local
    services call setpgid, which a session leader may not."""
    lifeline = Path(options.log).with_name(f"{mark}.lifeline")
    with open(options.log, "ab") as log:
        return subprocess.Popen(
            options.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(options.log).parent,
            env={**os.environ, ENGINE: mark, LIFELINE: str(lifeline)},
            process_group=0,
        )


def _stop(command: subprocess.Popen[bytes], how: str, grace_s: float, writer: int) -> None:
    if how == "close":
        os.close(writer)
    else:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        command.wait(grace_s)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
