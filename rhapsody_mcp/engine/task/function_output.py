"""Separates the output of a worker by function: each function gets what it printed."""

from __future__ import annotations

import mmap
import os
import select
import time
from pathlib import Path

from rhapsody_mcp.engine.task.output import collect
from rhapsody_mcp.engine.task.output_files import CURRENT_TASK, MOVE_COUNT, STREAMS, shared_count
from rhapsody_mcp.model.values import Stream

__all__ = ["FunctionOutput"]

_DRAIN_TIMEOUT_S = 10.0
_NO_OUTPUT = (Stream(), Stream())
_UID_BYTES = 512


class FunctionOutput:
    """The pipes behind stdout and stderr, and the two files into which the supervisor moves the data of the pipes."""

    def __init__(self, path: Path) -> None:
        """`path` is the path of the supervisor's plan. Create this object while stdout and stderr of the process are
        still the pipes."""
        self._paths = [path.with_suffix(f".{suffix}") for suffix in STREAMS]
        self._files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in self._paths]
        self._move_count = shared_count(str(path.with_suffix(f".{MOVE_COUNT}")))
        self._collected_count = self._move_count[0]
        self._current_uid = _shared_text(str(path.with_suffix(f".{CURRENT_TASK}")))
        self.are_pipes_closed = False
        """Whether a function has closed the descriptors of the pipes."""
        self._pipes = select.poll()
        for descriptor in (1, 2):
            reader = os.open(f"/dev/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._pipes.register(reader, select.POLLIN)

    def begin(self, uid: str) -> None:
        """Note that what comes from now on is the output of this task."""
        data = f"{uid}\0".encode()
        if len(data) <= _UID_BYTES:
            self._current_uid[: len(data)] = data

    def collect(self, folder: str, max_bytes: int | None) -> tuple[Stream, Stream]:
        """Return the output since the last call. No function may run during the call."""
        if self._is_data_moving():
            self._wait_for_data()
        if self._move_count[0] == self._collected_count:
            return _NO_OUTPUT
        self._collected_count = self._move_count[0]
        return self._collect_stream(0, folder, max_bytes), self._collect_stream(1, folder, max_bytes)

    def _wait_for_data(self) -> None:
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        while self._is_data_moving() and time.monotonic() < deadline:
            time.sleep(0.00005)  # poll() can wait for data in a pipe, but not for an empty pipe

    def _is_data_moving(self) -> bool:
        """Return whether a pipe holds data, or the supervisor is moving data into a file."""
        for _, event in self._pipes.poll(0):
            if event & select.POLLNVAL:
                self.are_pipes_closed = True
            if event & select.POLLIN:
                return True
        return bool(self._move_count[0] % 2)

    def _collect_stream(self, stream: int, folder: str, max_bytes: int | None) -> Stream:
        try:
            return collect(self._files[stream], folder, max_bytes)
        except OSError:  # a function has closed all descriptors
            with open(self._paths[stream], "r+b") as file:
                return collect(file.fileno(), folder, max_bytes)


def _shared_text(path: str) -> mmap.mmap:
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, _UID_BYTES)
        return mmap.mmap(file, _UID_BYTES)
    finally:
        os.close(file)
