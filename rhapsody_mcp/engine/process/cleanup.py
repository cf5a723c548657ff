"""Ends the remaining processes of engines whose keepers have ended, and deletes the engines' files in /dev/shm.

While a keeper runs, its note is in the engine's folder. A keeper that ends normally leaves nothing; a killed keeper
leaves the note.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rhapsody_mcp.engine.process.shared_memory import dragon_files, existing_files, segments_of, unlink_unused
from rhapsody_mcp.engine.process.tree import (
    ENGINE,
    PROCESS_MARK,
    end,
    engine_programs_using,
    groups_of,
    marked,
    processes_writing_into,
    relatives,
)

__all__ = [
    "end_remains",
    "has_live_keeper",
    "keeper_note",
    "recorded_segments",
    "was_killed",
    "write_launcher",
    "write_segments",
]

_NOTE_SUFFIX = "keeper"
_SEGMENTS_SUFFIX = "segments"


@contextmanager
def keeper_note(folder: Path, mark: str) -> Iterator[None]:
    """Create a keeper's note in the folder, locked while the keeper lives and deleted when the context ends."""
    note = folder / f"{mark}.{_NOTE_SUFFIX}"
    descriptor = os.open(note, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        for file in (note, folder / f"{mark}.{_SEGMENTS_SUFFIX}"):
            file.unlink(missing_ok=True)
        os.close(descriptor)


def write_launcher(folder: Path, mark: str, launcher: int) -> None:
    """Write the process id of the launcher into the note: the names of files in /dev/shm contain it."""
    (folder / f"{mark}.{_NOTE_SUFFIX}").write_text(str(launcher))


def write_segments(folder: Path, mark: str, segments: Iterable[str]) -> None:
    """Record which files in /dev/shm an engine uses: once its processes are killed, only this record names them."""
    inodes = {path: os.stat(path).st_ino for path in segments if os.path.exists(path)}
    (folder / f"{mark}.{_SEGMENTS_SUFFIX}").write_text(json.dumps(inodes))


def recorded_segments(folder: Path, mark: str) -> set[str]:
    """Return the files of `write_segments` that still exist."""
    try:
        return existing_files(json.loads((folder / f"{mark}.{_SEGMENTS_SUFFIX}").read_text()))
    except (OSError, ValueError):
        return set()


def was_killed(folder: Path, mark: str) -> bool:
    """Return whether the keeper of this mark, which has ended, did not end normally."""
    return (folder / f"{mark}.{_NOTE_SUFFIX}").exists()


def has_live_keeper(folder: Path) -> bool:
    """Return whether a living keeper has its note in this folder."""
    return any(_is_locked(note) for note in _notes(folder))


def end_remains(folder: Path | None, marks: Iterable[str] = ()) -> list[int]:
    """End every process of the engines with these marks, and of the engines in this folder whose keepers have ended;
    then delete their files in /dev/shm. Return the ids of the ended processes.

    A process belongs to an engine if its environment contains the mark, if its output goes into the folder, if it is a
    program of this package started with a file in the folder, or if it is a descendant of such a process or in one
    session with it. Other processes are not found.
    """
    known, sessions = set(marks), set[int]()
    notes = {note.stem: note for note in _notes(folder)} if folder is not None else {}
    live_marks = {mark for mark, note in notes.items() if mark not in known and _is_locked(note)}
    notes = {mark: note for mark, note in notes.items() if mark not in live_marks}
    ended_marks = {*notes, *known}
    if not ended_marks:
        return []
    searched_folder = None if live_marks else folder

    def remaining_processes() -> set[int]:
        marked_pids = {pid for mark in ended_marks for name in (ENGINE, PROCESS_MARK) for pid in marked(name, mark)}
        pids_in_folder = (
            {*processes_writing_into(searched_folder), *engine_programs_using(searched_folder)}
            if searched_folder
            else set[int]()
        )
        return relatives(marked_pids | pids_in_folder, sessions) - {os.getpid()}

    pids = remaining_processes()
    launchers = groups_of(pids) | {_launcher_pid(note) for note in notes.values()} - {0}
    files = segments_of(pids).union(*map(dragon_files, launchers))
    if folder is not None:
        files |= set().union(*(recorded_segments(folder, mark) for mark in ended_marks))
    end(remaining_processes)
    unlink_unused(files)
    for note in notes.values():
        note.unlink(missing_ok=True)
    return sorted(pids)


def _notes(folder: Path) -> list[Path]:
    """Return the notes in the folder and in its subfolders: an engine's PMI trials have subfolders."""
    return [*folder.glob(f"*.{_NOTE_SUFFIX}"), *folder.glob(f"*/*.{_NOTE_SUFFIX}")]


def _launcher_pid(note: Path) -> int:
    try:
        return int(note.read_text())
    except (OSError, ValueError):
        return 0


def _is_locked(note: Path) -> bool:
    with suppress(OSError):
        descriptor = os.open(note, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False
