"""Temporary folders that are deleted even if the process that created them is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rhapsody_mcp.engine.process.cleanup import end_remains, has_live_keeper
from rhapsody_mcp.engine.process.kept_output import keep_output

__all__ = ["RunDir", "is_run_dir", "remove", "sweep", "take_over"]

_LOCK = "lock"
_SOCKET_PATH_BYTES = 80  # a Unix socket's path is at most 103 bytes on macOS, 107 on Linux


class RunDir:
    """A folder that only this user can enter, locked by its owner while the owner lives. `remove` deletes the folder.
    If the owner is killed, the next process that creates a RunDir ends the remaining processes and deletes the folder.
    """

    def __init__(self) -> None:
        root = _root()
        for folder in root.iterdir():
            sweep(folder)
        self.path, self._lock = _create(root)

    def remove(self) -> None:
        """Delete the folder. A second call does nothing."""
        if self._lock >= 0:
            end_remains(self.path, ())
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _root() -> Path:
    """Return a folder named after the user in the system's temporary folder; its path is short enough for sockets."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _SOCKET_PATH_BYTES - 40:
        base = "/tmp"
    root = Path(base, f"rhapsody-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    if root.lstat().st_uid != os.getuid() or root.is_symlink():
        raise PermissionError(f"{root} belongs to somebody else; remove it, or set TMPDIR to a folder of yours.")
    root.chmod(0o700)
    return root


def _create(root: Path) -> tuple[Path, int]:
    """Create a folder and lock it; create another one if `sweep` of another process deletes the folder before it is
    locked."""
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


def is_run_dir(path: Path) -> bool:
    """Return whether the path is that of a RunDir of this user, existing or deleted."""
    is_normal = path.is_absolute() and ".." not in path.parts and not path.is_symlink()
    return is_normal and path.parent.name == f"rhapsody-{os.getuid()}"


def remove(folder: Path, marks: Iterable[str] = ()) -> list[int]:
    """Delete a RunDir that was taken over, with the remaining processes of its engines and of the engines with these
    marks; what their tasks had printed is kept. Return the ids of the ended processes."""
    ended = end_remains(folder, marks)
    keep_output(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def sweep(folder: Path) -> None:
    """Delete a folder whose owner has ended, with the remains of its engines. A folder with a living keeper is left:
    the keeper cleans up."""
    with suppress(OSError):
        folder.rmdir()  # only succeeds if the folder is empty: not yet locked, or created again too late
    with take_over(folder) as is_taken_over:
        if is_taken_over and not has_live_keeper(folder):
            remove(folder)


@contextmanager
def take_over(folder: Path) -> Iterator[bool]:
    """Lock a folder in place of its owner. Gives False if the owner lives, if another process has taken over the
    folder, or if there is no such folder."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _try_lock(lock)
    finally:
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
