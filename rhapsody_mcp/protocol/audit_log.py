"""Appends audit entries to a log file with rotation."""

from __future__ import annotations

import json
import logging
import os
import queue
from collections.abc import Mapping
from io import TextIOWrapper
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

__all__ = ["AuditFile"]

_MAX_QUEUED = 10_000


class AuditFile:
    """A file of mode 0600 with one entry a line, as ASCII JSON, written by a thread.

    An entry that cannot be written, as on a full disk, is dropped; the next written entry has the number of dropped
    ones.
    """

    def __init__(self, file: Path, max_bytes: int, files: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(_MAX_QUEUED)
        self._handler = _SharedRotatingHandler(file, max_bytes, files)
        self._listener = QueueListener(self._queue, self._handler)
        self._closed = False
        self._listener.start()

    @property
    def dropped(self) -> int:
        """How many entries were dropped since the last written one."""
        return self._handler.dropped

    def write(self, entry: Mapping[str, Any]) -> None:
        """Never waits, and never raises."""
        try:
            self._queue.put_nowait(logging.makeLogRecord({"msg": dict(entry)}))
        except queue.Full:
            self._handler.dropped += 1

    def close(self) -> None:
        """Write the queued entries and close the file. Later entries are ignored."""
        if not self._closed:
            self._closed = True
            self._listener.stop()
            self._handler.close()


class _SharedRotatingHandler(RotatingFileHandler):
    """Several processes may write the same file: each opens the file again after another has rotated it."""

    def __init__(self, file: Path, max_bytes: int, files: int) -> None:
        super().__init__(file, maxBytes=max_bytes, backupCount=files, encoding="utf-8", delay=True)
        self.dropped = 0
        self._reported = 0

    def _open(self) -> TextIOWrapper:
        os.makedirs(os.path.dirname(self.baseFilename), 0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = open(self.baseFilename, "a+", encoding="utf-8", opener=lambda path, _: os.open(path, flags, 0o600))
        size = os.fstat(opened.fileno()).st_size
        if size and os.pread(opened.fileno(), 1, size - 1) != b"\n":
            opened.write("\n")  # ends a line that a full disk cut off
        return opened

    def format(self, record: logging.LogRecord) -> str:
        dropped = {"dropped_before": self._reported} if self._reported else {}
        return json.dumps({**record.msg, **dropped}, default=str)  # type: ignore[dict-item]

    def emit(self, record: logging.LogRecord) -> None:
        self._reported = before = self.dropped
        super().emit(record)
        if self.dropped == before:
            self.dropped -= self._reported

    def shouldRollover(self, record: logging.LogRecord) -> int:
        if self.stream is not None and not self._is_current(self.stream):
            self._close_stream()
        return super().shouldRollover(record)

    def _is_current(self, opened: TextIOWrapper) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(os.stat(self.baseFilename), os.fstat(opened.fileno()))
        except OSError:
            return False

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1
        self._close_stream()

    def _close_stream(self) -> None:
        opened, self.stream = self.stream, None
        try:
            if opened is not None:
                opened.close()
        except OSError:
            return
