"""Ends what is left of engines that have lost their keepers: processes, files in /dev/shm.

A keeper that ends by itself leaves nothing. One that is killed leaves a note in the engine's folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rhapsody_mcp.engine.process.shared_memory import dragon_files, segments_of, still_there, unlink_unused
from rhapsody_mcp.engine.process.tree import (
    ENGINE,
    PROCESS_MARK,
    end,
    groups_of,
    marked,
    programs_with,
    relatives,
    writing_into,
)

__all__ = ["end_remains", "is_kept", "keep_note", "noted_segments", "was_killed", "write_launcher", "write_segments"]

_NOTE = "keeper"
_SEGMENTS = "segments"


@contextmanager
def keep_note(folder: Path, mark: str) -> Iterator[None]:
    """A keeper's note in this folder: locked for as long as the keeper lives, deleted at its end."""
    note = folder / f"{mark}.{_NOTE}"
    descriptor = os.open(note, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        for file in (note, folder / f"{mark}.{_SEGMENTS}"):
            file.unlink(missing_ok=True)
        os.close(descriptor)


def write_launcher(folder: Path, mark: str, launcher: int) -> None:
    """Write into the note which process the keeper has started: files in /dev/shm may be named after it."""
    (folder / f"{mark}.{_NOTE}").write_text(str(launcher))


def write_segments(folder: Path, mark: str, segments: Iterable[str]) -> None:
    """Write down which files in /dev/shm an engine uses: when all its processes are killed nothing else tells."""
    inodes = {path: os.stat(path).st_ino for path in segments if os.path.exists(path)}
    (folder / f"{mark}.{_SEGMENTS}").write_text(json.dumps(inodes))


def noted_segments(folder: Path, mark: str) -> set[str]:
    """What `write_segments` wrote down, and is still there."""
    try:
        return still_there(json.loads((folder / f"{mark}.{_SEGMENTS}").read_text()))
    except (OSError, ValueError):
        return set()


def was_killed(folder: Path, mark: str) -> bool:
    """Whether this mark's keeper, which has ended, did not come to its proper end."""
    return (folder / f"{mark}.{_NOTE}").exists()


def is_kept(folder: Path) -> bool:
    """Whether a keeper lives that has its note in this folder."""
    return any(_is_locked(note) for note in _notes(folder))


def end_remains(folder: Path | None, marks: Iterable[str] = ()) -> list[int]:
    """End every process of the engines with these marks, and of those that have a note in this folder where there is
    one, whose keepers are gone; then remove their files in /dev/shm. The processes that were ended.

    A process is an engine's where the mark is in its environment, where its output goes into the folder, where it is a
    program of ours that was started with a file in the folder, or where it descends from such a process or is in one
    session with it. Not found is one that none of this holds for.
    """
    known, sessions = set(marks), set[int]()
    notes = {note.stem: note for note in _notes(folder)} if folder is not None else {}
    others = {mark for mark, note in notes.items() if mark not in known and _is_locked(note)}
    notes = {mark: note for mark, note in notes.items() if mark not in others}
    every = {*notes, *known}
    if not every:
        return []
    lone = None if others else folder

    def left() -> set[int]:
        own = {pid for mark in every for name in (ENGINE, PROCESS_MARK) for pid in marked(name, mark)}
        there = {*writing_into(lone), *programs_with(lone)} if lone else set[int]()
        return relatives(own | there, sessions) - {os.getpid()}

    pids = left()
    launchers = groups_of(pids) | {_number(note) for note in notes.values()} - {0}
    files = segments_of(pids).union(*map(dragon_files, launchers))
    if folder is not None:
        files |= set().union(*(noted_segments(folder, mark) for mark in every))
    end(left)
    unlink_unused(files)
    for note in notes.values():
        note.unlink(missing_ok=True)
    return sorted(pids)


def _notes(folder: Path) -> list[Path]:
    """Also those of the trials that an engine made in folders in its own."""
    return [*folder.glob(f"*.{_NOTE}"), *folder.glob(f"*/*.{_NOTE}")]


def _number(note: Path) -> int:
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
