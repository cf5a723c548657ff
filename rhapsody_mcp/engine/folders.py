"""Temporary folders that do not outlive the process that made them, even when that is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from rhapsody_mcp.engine.shared_memory import dragon_files, unlink_unused

__all__ = ["LAUNCHER", "Folder"]

LAUNCHER = "launcher"
"""The file of a folder that holds the process id of the Dragon launcher that was started for it."""

_SOCKET_PATH_BYTES = 80  # a Unix socket's path is at most 103 bytes on macOS, 107 on Linux


class Folder:
    """A folder that only this user can enter. `remove` deletes it; what a killed process left is deleted by the
    next process that makes one: each folder is locked by its owner for as long as that lives."""

    def __init__(self) -> None:
        root = _root()
        _sweep(root)
        self.path = Path(tempfile.mkdtemp(dir=root))
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Delete the folder. A second call does nothing."""
        if self._lock >= 0:
            _delete(self.path)
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


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        with suppress(OSError):
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(folder)
            finally:
                os.close(lock)


def _delete(folder: Path) -> None:
    with suppress(OSError, ValueError):
        unlink_unused(dragon_files(int((folder / LAUNCHER).read_text())))
    shutil.rmtree(folder, ignore_errors=True)
