"""What the functions of a worker print, told apart by function."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from rhapsody_mcp.engine.task.output import collect
from rhapsody_mcp.engine.task.output_files import MOVES, STREAMS, shared_count
from rhapsody_mcp.model.values import Stream

__all__ = ["Printed"]

_DRAINED_S = 10.0
_NOTHING = (Stream(), Stream())


class Printed:
    """The pipes that stdout and stderr are, and the files that a supervisor moves into what comes through them."""

    def __init__(self, path: Path) -> None:
        """Of the supervisor whose plan has this path; for the process whose stdout and stderr are still the pipes."""
        self._paths = [path.with_suffix(f".{suffix}") for suffix in STREAMS]
        self._files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in self._paths]
        self._moves = shared_count(str(path.with_suffix(f".{MOVES}")))
        self._collected = self._moves[0]
        self.is_closed = False
        """Whether a function has closed what it could."""
        self._pipes = select.poll()
        for descriptor in (1, 2):
            reader = os.open(f"/dev/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._pipes.register(reader, select.POLLIN)

    def collect(self, folder: str, most: int | None) -> tuple[Stream, Stream]:
        """What was printed since the last time. To be called when nobody prints."""
        if self._is_under_way():
            self._wait()
        if self._moves[0] == self._collected:
            return _NOTHING
        self._collected = self._moves[0]
        return self._take(0, folder, most), self._take(1, folder, most)

    def _wait(self) -> None:
        deadline = time.monotonic() + _DRAINED_S
        while self._is_under_way() and time.monotonic() < deadline:
            time.sleep(0.00005)  # a pipe tells when there is something, and not when there is nothing

    def _is_under_way(self) -> bool:
        """Whether something is in a pipe, or on its way into a file."""
        for _, event in self._pipes.poll(0):
            if event & select.POLLNVAL:
                self.is_closed = True
            if event & select.POLLIN:
                return True
        return bool(self._moves[0] % 2)

    def _take(self, stream: int, folder: str, most: int | None) -> Stream:
        try:
            return collect(self._files[stream], folder, most)
        except OSError:  # a function has closed all files
            with open(self._paths[stream], "r+b") as file:
                return collect(file.fileno(), folder, most)
