"""Appends what happened to a log file that rotates."""

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

_WAITING = 10_000


class AuditFile:
    """Each entry is a line of JSON, in ASCII, in a file of mode 0600; a thread of its own writes it.

    An entry that cannot be written, as on a full disk, is dropped and counted; the next that can says how many.
    """

    def __init__(self, file: Path, max_bytes: int, files: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(_WAITING)
        self._handler = _Rotated(file, max_bytes, files)
        self._listener = QueueListener(self._queue, self._handler)
        self._closed = False
        self._listener.start()

    @property
    def dropped(self) -> int:
        """How many entries no entry in the file has told of yet."""
        return self._handler.dropped

    def write(self, entry: Mapping[str, Any]) -> None:
        """Never waits, and never raises."""
        try:
            self._queue.put_nowait(logging.makeLogRecord({"msg": dict(entry)}))
        except queue.Full:
            self._handler.dropped += 1

    def close(self) -> None:
        """What was given before is written first; nothing is written after it."""
        if not self._closed:
            self._closed = True
            self._listener.stop()
            self._handler.close()


class _Rotated(RotatingFileHandler):
    """Several processes may write the same file: each finds it again where another has rotated it."""

    def __init__(self, file: Path, max_bytes: int, files: int) -> None:
        super().__init__(file, maxBytes=max_bytes, backupCount=files, encoding="utf-8", delay=True)
        self.dropped = 0
        self._tell = 0

    def _open(self) -> TextIOWrapper:
        os.makedirs(os.path.dirname(self.baseFilename), 0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = open(self.baseFilename, "a+", encoding="utf-8", opener=lambda path, _: os.open(path, flags, 0o600))
        size = os.fstat(opened.fileno()).st_size
        if size and os.pread(opened.fileno(), 1, size - 1) != b"\n":
            opened.write("\n")  # after the half of a line that was written as the disk got full
        return opened

    def format(self, record: logging.LogRecord) -> str:
        told = {"dropped_before": self._tell} if self._tell else {}
        return json.dumps({**record.msg, **told}, default=str)  # type: ignore[dict-item]

    def emit(self, record: logging.LogRecord) -> None:
        self._tell = before = self.dropped
        super().emit(record)
        if self.dropped == before:
            self.dropped -= self._tell

    def shouldRollover(self, record: logging.LogRecord) -> int:
        if self.stream is not None and not self._has(self.stream):
            self._let_go()
        return super().shouldRollover(record)

    def _has(self, opened: TextIOWrapper) -> bool:
        """Whether it is still what is at our path."""
        try:
            return os.path.samestat(os.stat(self.baseFilename), os.fstat(opened.fileno()))
        except OSError:
            return False

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1
        self._let_go()

    def _let_go(self) -> None:
        opened, self.stream = self.stream, None
        try:
            if opened is not None:
                opened.close()
        except OSError:
            return
