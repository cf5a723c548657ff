"""Runs a command as long as its owner lives, and cleans up after it.

    python -m rhapsody_mcp.engine.keeper --name NAME --log FILE [OPTIONS] -- COMMAND...

The owner starts the keeper as a session leader, and holds the other end of its standard input. When that closes, also
because the owner was killed, the keeper stops the command: with TERM, or (close) by closing the FIFO that
RHAPSODY_LIFELINE names and the command watches. After the grace period, in seconds, the keeper kills the remaining
processes and every process with the command's mark, and deletes their files in /dev/shm; if the owner has ended, also
the folder of the log. The keeper ends with the command's exit code.
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

_CHECK_INTERVAL_S = 0.25
_CHECKS_AFTER_CHANGE = 4
"""The number of checks after the files in /dev/shm have changed: a process maps a file a moment after its creation."""


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
        with _recording_segments(folder, mark, command.pid) as record:
            if not child_ends_first(command.pid, 0):
                record()
                _stop(command, options.stop, options.grace, writer)
            record()
            _kill_group(command.pid)
            code = command.wait()
            end(lambda: {*marked(ENGINE, mark), *_engine_processes(command.pid)})
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
    """Create a FIFO, and give its writing end."""
    os.mkfifo(path, 0o600)
    try:
        yield os.open(path, os.O_RDWR | os.O_CLOEXEC)
    finally:
        path.unlink(missing_ok=True)


def _engine_processes(leader: int) -> set[int]:
    return {*group(leader), *descendants(os.getpid())}


@contextmanager
def _recording_segments(folder: Path, mark: str, leader: int) -> Iterator[Callable[[], None]]:
    """Record the files in /dev/shm that the engine uses, whenever they change: the engine may leave files, and after
    its end only this record names them. Gives a function that updates the record at once."""
    recorded: set[str] = set()
    lock, stopped = threading.Lock(), threading.Event()

    def record() -> None:
        with lock:
            if not (segments := segments_of(_engine_processes(leader))) <= recorded:
                recorded.update(segments)
                write_segments(folder, mark, recorded)

    def watch() -> None:
        last_names, checks_left = set[str](), 0
        while not stopped.wait(_CHECK_INTERVAL_S):
            checks_left = checks_left - 1 if (names := named_segments()) == last_names else _CHECKS_AFTER_CHANGE
            last_names = names
            if checks_left > 0:
                record()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield record
    finally:
        stopped.set()
        watcher.join()


def _start(options: argparse.Namespace, mark: str) -> subprocess.Popen[bytes]:
    """Start the command in a new process group of the keeper's session. A new session would not work: Dragon's local
    services call setpgid, which fails in a session leader."""
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
