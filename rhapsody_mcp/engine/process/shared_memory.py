"""Files in /dev/shm that killed processes leave: which they are, and their removal."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["dragon_files", "named_segments", "segments_of", "still_there", "unlink_unused"]

_SEGMENTS = ("psm_*", "sem.mp-*", "nccl-*")


def dragon_files(launcher: int) -> set[str]:
    """The files that a Dragon runtime with this launcher's process id makes; its id is part of their names."""
    prefix = f"DD{str(os.getuid())[-3:]}{str(launcher)[-3:]}"
    return {*glob.glob(f"/dev/shm/{prefix}*"), *glob.glob(f"/dev/shm/*{launcher}[DM]")}


def named_segments() -> set[str]:
    """Every segment and semaphore of this machine, by its name."""
    return {path for pattern in _SEGMENTS for path in glob.glob(f"/dev/shm/{pattern}")}


def segments_of(pids: Iterable[int]) -> set[str]:
    """The segments and semaphores of Python's multiprocessing, and of NCCL, that these processes use now."""
    named = named_segments()
    return named & _used(named, (Path(f"/proc/{pid}/maps") for pid in pids)) if named else named


def still_there(inodes: dict[str, int]) -> set[str]:
    """Those of these files that are still the ones with these inodes, and not others of the same names."""
    return {path for path, inode in inodes.items() if _inode(path) == str(inode)}


def unlink_unused(paths: set[str]) -> None:
    """Remove those that no living process uses: the name of another runtime's may differ only in digits that
    Dragon leaves out."""
    for path in paths - _used(paths, Path("/proc").glob("[0-9]*/maps")) if paths else ():
        with suppress(OSError):
            os.unlink(path)


def _used(paths: set[str], maps: Iterable[Path]) -> set[str]:
    """By inode: a semaphore is mapped under a name that it had before."""
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
