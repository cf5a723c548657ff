"""A log of the tasks that have started, stored beside the results: it outlives the engine and the server."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # import little: the supervisor of every program imports this module
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FOLDER_GONE", "NOT_STARTED", "START_NOT_LOGGED", "log_start", "read_starts"]

START_NOT_LOGGED = "it was not started, because that could not be written down: {}"
NOT_STARTED = "its process could not be started: {}"
FOLDER_GONE = (
    "the folder {} of this session is gone. Make it again, or give the task a cwd, or open a session in a chat that "
    "runs in another folder (create_session)."
)

_FILE_NAME = "starts"
_MAX_OPEN = 4
_descriptors: dict[str, int] = {}


def log_start(folder: str, uid: str, attempt: int) -> None:
    """Append the start of a task to the log, just before user code runs. The entry survives the end of every process,
    but not a power failure. Raises OSError."""
    if folder not in _descriptors:
        if len(_descriptors) == _MAX_OPEN:
            os.close(_descriptors.pop(next(iter(_descriptors))))
        _descriptors[folder] = os.open(
            f"{folder}/{_FILE_NAME}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
    os.write(_descriptors[folder], f"{uid} {attempt}\n".encode())


def read_starts(folder: str | Path) -> set[tuple[str, int]]:
    """Return the uid and the attempt number of each start in the log."""
    try:
        with open(os.path.join(folder, _FILE_NAME), encoding="utf-8", errors="replace") as file:
            entries = [line.rpartition(" ") for line in file.read().splitlines()]
    except FileNotFoundError:
        return set()
    return {(uid, int(attempt)) for uid, _, attempt in entries if attempt.isdecimal()}
