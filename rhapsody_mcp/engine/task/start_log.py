"""Notes of which tasks have started, beside their results: they outlive the engine, and whoever asked for the tasks."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # few imports: the supervisor of every program imports this
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FOLDER_GONE", "NOT_NOTED", "NOT_STARTED", "note_start", "starts_in"]

NOT_NOTED = "it was not started, because that could not be written down: {}"
NOT_STARTED = "its process could not be started: {}"
FOLDER_GONE = (
    "the folder {} of this session is gone. Make it again, or give the task a cwd, or open a session in a chat that "
    "runs in another folder (create_session)."
)

_NAME = "starts"
_MOST_OPEN = 4
_opened: dict[str, int] = {}


def note_start(folder: str, uid: str, attempt: int) -> None:
    """Just before user code runs. The note survives the end of every process, and not a power cut. Raises OSError."""
    if folder not in _opened:
        if len(_opened) == _MOST_OPEN:
            os.close(_opened.pop(next(iter(_opened))))
        _opened[folder] = os.open(f"{folder}/{_NAME}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(_opened[folder], f"{uid} {attempt}\n".encode())


def starts_in(folder: str | Path) -> set[tuple[str, int]]:
    """Which tasks have started, each with the number of its attempt."""
    try:
        with open(os.path.join(folder, _NAME), encoding="utf-8", errors="replace") as file:
            noted = [line.rpartition(" ") for line in file.read().splitlines()]
    except FileNotFoundError:
        return set()
    return {(uid, int(attempt)) for uid, _, attempt in noted if attempt.isdecimal()}
