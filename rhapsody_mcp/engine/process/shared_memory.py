"""Finds and deletes the files in /dev/shm that killed processes leave."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["dragon_files", "existing_files", "named_segments", "old_dragon_files", "segments_of", "unlink_unused"]

_NEW_S = 1.0
_SEGMENTS = ("psm_*", "sem.mp-*", "nccl-*")


def dragon_files(launcher: int) -> set[str]:
    """Return the files of the Dragon runtime whose launcher has this process id: their names contain the id."""
    prefix = f"DD{str(os.getuid())[-3:]}{str(launcher)[-3:]}"
    return {*glob.glob(f"/dev/shm/{prefix}*"), *glob.glob(f"/dev/shm/*{launcher}[DM]")}


def old_dragon_files() -> set[str]:
    """Return the files of all Dragon runtimes of this user, without those that may be new: a process maps a file a
    moment after its creation. The names contain process ids, on each node other ones."""
    limit = time.time() - _NEW_S
    return {path for path in glob.glob(f"/dev/shm/DD{str(os.getuid())[-3:]}*") if _changed(path) < limit}


def _changed(path: str) -> float:
    try:
        return os.stat(path).st_ctime
    except OSError:
        return time.time()


def named_segments() -> set[str]:
    """Return the paths of all segments and semaphores on this machine."""
    return {path for pattern in _SEGMENTS for path in glob.glob(f"/dev/shm/{pattern}")}


def segments_of(pids: Iterable[int]) -> set[str]:
    """Return the segments and semaphores, of Python's multiprocessing and of NCCL, that these processes use now."""
    named = named_segments()
    return named & _used(named, (Path(f"/proc/{pid}/maps") for pid in pids)) if named else named


def existing_files(inodes: dict[str, int]) -> set[str]:
    """Return the files that still exist with these inodes; a new file of the same name has another inode."""
    return {path for path, inode in inodes.items() if _inode(path) == str(inode)}


def unlink_unused(paths: set[str]) -> None:
    """Delete the files that no living process uses. Files of another runtime may be among `paths`: Dragon's file names
    contain only the last digits of an id."""
    for path in paths - _used(paths, Path("/proc").glob("[0-9]*/maps")) if paths else ():
        with suppress(OSError):
            os.unlink(path)


def _used(paths: set[str], maps: Iterable[Path]) -> set[str]:
    """Return the mapped files. Inodes are compared, because /proc shows the name that a semaphore had when it was
    mapped."""
    inodes = set()
    for file in maps:
        with suppress(OSError):
            inodes |= {line.split()[4] for line in file.read_text().splitlines() if "/dev/shm/" in line}
    return {path for path in paths if _inode(path) in inodes}


def _inode(path: str) -> str:
    try:
        return str(os.stat(path).st_ino)
    except OSError:
        return ""
