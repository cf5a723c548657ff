"""Reads what tasks tell of their progress, line by line, from the files into which they write it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from rhapsody_mcp.engine.task.output_files import punch_hole
from rhapsody_mcp.model.live.progress import Progress, advanced, read_line

__all__ = ["PROGRESS", "ProgressFile"]

PROGRESS = "progress"
"""Suffix of the file into which a task, or the functions of a worker, write their progress."""
_READ_BYTES = 64 * 1024
_PUNCH_BYTES = 1024 * 1024


class ProgressFile:
    """The file of one process; a program may create it at any time.

    Of more than 64 KiB of lines between two reads, only the last are read. What was read is freed on the disk. The
    methods may be called in any thread.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.uid = ""
        """The task that wrote the last line, where the line says so."""
        self.progress: Progress | None = None
        """What that task has told."""
        self._read, self._freed, self._changed_ns = 0, 0, 0
        self._lock = threading.RLock()

    def advance(self) -> bool:
        """Read the complete lines that are new; return whether there were any."""
        with self._lock:
            return self._advance()

    def _advance(self) -> bool:
        try:
            status = os.stat(self.path)
            if status.st_size <= self._read:
                if status.st_mtime_ns == self._changed_ns:
                    return False
                self._read = self._freed = 0  # overwritten, in place of more lines
            file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                lines = self._new_lines(file)
            finally:
                os.close(file)
        except OSError:
            return False
        now = time.time()
        for line in lines:
            uid, progress = read_line(line, now)
            self.progress = advanced(self.progress if uid == self.uid else None, progress)
            self.uid = uid
        return bool(lines)

    def _new_lines(self, file: int) -> list[bytes]:
        size = os.fstat(file).st_size
        start = max(self._read, size - _READ_BYTES)
        data = os.pread(file, size - start, start)
        end = data.rfind(b"\n") + 1
        lines = data[:end].split(b"\n")
        if start > self._read:
            del lines[0]  # its beginning is not there
        self._read = start + end if end else self._read
        if self._read - self._freed > _PUNCH_BYTES:
            punch_hole(file, self._freed, self._read - self._freed)
            self._freed = self._read
        self._changed_ns = os.fstat(file).st_mtime_ns  # punch_hole changes it too
        return [line for line in lines if line.strip(b"\0 \r")]

    def final(self) -> Progress | None:
        """What the task has told at its end, also in a last line without a line break. Deletes the file."""
        with self._lock:
            if os.path.exists(self.path):
                self._advance()
                if rest := self._rest():
                    self.progress = advanced(self.progress, read_line(rest, time.time())[1])
                with suppress(OSError):
                    os.unlink(self.path)
            return self.progress

    def _rest(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                return file.read(_READ_BYTES).strip(b"\0 \r\n")
        except OSError:
            return b""
