"""A log of the tasks that have started, stored beside the results: it outlives the engine and the server."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # import little: the supervisor of every program imports this module
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FOLDER_GONE", "NOT_STARTED", "START_NOT_LOGGED", "log_start", "place_of", "read_places", "read_starts"]

START_NOT_LOGGED = "it was not started, because that could not be written down: {}"
NOT_STARTED = "its process could not be started: {}"
FOLDER_GONE = (
    "the folder {} of this session is gone. Make it again, or give the task a cwd, or open a session in a chat that "
    "runs in another folder (create_session)."
)

_FILE_NAME = "starts"
_MAX_OPEN = 4
_descriptors: dict[str, int] = {}


def place_of(path: str) -> str:
    """Return the place of a supervisor in a log: the last two parts of its path, which name its engine and itself."""
    return "/".join(path.split("/")[-2:])


def log_start(folder: str, uid: str, attempt: int, place: str) -> None:
    """Append the start of a task under the supervisor at `place` to the log, just before user code runs. The entry
    survives the end of every process, but not a power failure. Raises OSError."""
    if folder not in _descriptors:
        if len(_descriptors) == _MAX_OPEN:
            os.close(_descriptors.pop(next(iter(_descriptors))))
        _descriptors[folder] = os.open(
            f"{folder}/{_FILE_NAME}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
    os.write(_descriptors[folder], f"{uid} {attempt}\t{place}\n".encode())


def read_starts(folder: str | Path) -> set[tuple[str, int]]:
    """Return the uid and the attempt number of each start in the log."""
    return {start for start, _ in _entries(folder)}


def read_places(folder: str | Path) -> dict[tuple[str, int], list[str]]:
    """Return the places of each start in the log, by uid and attempt number: one for each rank, in rank order."""
    places: dict[tuple[str, int], list[str]] = {}
    for start, place in _entries(folder):
        if place:
            places.setdefault(start, []).append(place)
    return {start: sorted(own, key=lambda place: (len(place), place)) for start, own in places.items()}


def _entries(folder: str | Path) -> Iterator[tuple[tuple[str, int], str]]:
    try:
        with open(os.path.join(folder, _FILE_NAME), encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        start, _, place = line.partition("\t")
        uid, _, attempt = start.rpartition(" ")
        if attempt.isdecimal():
            yield (uid, int(attempt)), place
