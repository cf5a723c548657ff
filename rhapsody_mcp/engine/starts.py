"""Notes of which tasks have started, beside their results: they outlive the engine, and whoever asked for the tasks."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

__all__ = ["NOT_NOTED", "note_start", "starts_in"]

NOT_NOTED = "it was not started, because that could not be written down: {}"

_NAME = "starts"


def note_start(folder: str, uid: str, attempt: int) -> None:
    """Just before user code runs. The note survives the end of every process, and not a power cut. Raises OSError."""
    os.write(_opened(f"{folder}/{_NAME}"), f"{uid} {attempt}\n".encode())


@lru_cache(maxsize=4)
def _opened(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def starts_in(folder: str | Path) -> set[tuple[str, int]]:
    """Which tasks have started, each with the number of its attempt."""
    try:
        lines = Path(folder, _NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    noted = (line.rpartition(" ") for line in lines)
    return {(uid, int(attempt)) for uid, _, attempt in noted if attempt.isdecimal()}
