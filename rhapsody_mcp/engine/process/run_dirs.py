"""Temporary folders that do not outlive the process that made them, even when that is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rhapsody_mcp.engine.process.cleanup import end_remains, is_kept

__all__ = ["Folder", "is_folder", "remove", "sweep", "taken_over"]

_LOCK = "lock"
_SOCKET_PATH_BYTES = 80  # a Unix socket's path is at most 103 bytes on macOS, 107 on Linux


class Folder:
    """A folder that only this user can enter. `remove` deletes it; what a killed process left is ended and deleted by
    the next process that makes one: each folder is locked by its owner for as long as that lives."""

    def __init__(self) -> None:
        root = _root()
        for folder in root.iterdir():
            sweep(folder)
        self.path, self._lock = _make(root)

    def remove(self) -> None:
        """Delete the folder. A second call does nothing."""
        if self._lock >= 0:
            remove(self.path)
            os.close(self._lock)
            self._lock = -1


def _root() -> Path:
    """A folder named after the user, in the system's temporary folder; short enough for sockets in it."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _SOCKET_PATH_BYTES - 40:
        base = "/tmp"
    root = Path(base, f"rhapsody-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    if root.lstat().st_uid != os.getuid() or root.is_symlink():
        raise PermissionError(f"{root} belongs to somebody else; remove it, or set TMPDIR to a folder of yours.")
    root.chmod(0o700)
    return root


def _make(root: Path) -> tuple[Path, int]:
    """A new folder and its lock; another one where somebody swept it away before it was locked."""
    while True:
        path = Path(tempfile.mkdtemp(dir=root))
        try:
            lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def is_folder(path: Path) -> bool:
    """Whether a `Folder` of this user has this path, or once had it."""
    plain = path.is_absolute() and ".." not in path.parts and not path.is_symlink()
    return plain and path.parent.name == f"rhapsody-{os.getuid()}"


def remove(folder: Path, marks: Iterable[str] = ()) -> list[int]:
    """Delete a `Folder` that was taken over, with all that is left of its engines and of those with these marks; the
    processes that were ended."""
    ended = end_remains(folder, marks)
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def sweep(folder: Path) -> None:
    """Delete a folder whose owner is gone, with what is left of its engines; not while a keeper lives in it, which
    leaves nothing when it ends."""
    with suppress(OSError):
        folder.rmdir()  # where it is empty: not even locked yet, or made again by somebody who was late
    with taken_over(folder) as taken:
        if taken and not is_kept(folder):
            remove(folder)


@contextmanager
def taken_over(folder: Path) -> Iterator[bool]:
    """Lock a folder in its owner's place; False where its owner lives, where another process has taken it over, and
    where there is no such folder."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _locks(lock)
    finally:
        os.close(lock)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
