"""Reimports the user's modules after one of their files was edited."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import time
from importlib.machinery import SourceFileLoader
from importlib.util import source_from_cache

__all__ = ["EditedModules", "skip_bytecode_of_recent_sources"]

_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_OWN_PACKAGE = __name__.partition(".")[0]
FileState = tuple[int, ...]
_MISSING: FileState = ()
_RECENT: FileState = (0,)
_RECENT_S = 2.0
"""Seconds. A file that was written so recently may be written again without a change of its time or its size."""


class EditedModules:
    """The user's modules in `sys.modules`, each with the state of its file at the import."""

    def __init__(self) -> None:
        self._standard = sysconfig.get_path("stdlib") + os.sep
        self._known_names, self._last_name = set(sys.modules), next(reversed(sys.modules))
        self._files: dict[str, tuple[str, FileState]] = {}
        """Module name to the path of its file and the state of the file."""

    def record_imports(self) -> None:
        """Record the user's modules that were imported since the last call."""
        if next(reversed(sys.modules)) == self._last_name:
            return
        for name in sys.modules.keys() - self._known_names:
            path = getattr(sys.modules[name], "__file__", None)
            if isinstance(path, str) and path.endswith(".py") and self._is_users(name, path):
                self._files[name] = path, _file_state(path, time.time() - _RECENT_S)
        self._known_names, self._last_name = set(sys.modules), next(reversed(sys.modules))

    def _is_users(self, name: str, path: str) -> bool:
        installed = path.startswith(self._standard) or any(part in path for part in _INSTALLED)
        return not installed and name.partition(".")[0] != _OWN_PACKAGE

    def unload_if_edited(self) -> None:
        """If the file of a module has changed, remove all recorded modules from `sys.modules`: they may hold objects of
        each other."""
        if all(_file_state(path) == state for path, state in self._files.values()):
            return
        for name in self._files:
            sys.modules.pop(name, None)
        self._files.clear()
        self._known_names, self._last_name = set(sys.modules), next(reversed(sys.modules))
        importlib.invalidate_caches()


def _file_state(path: str, recent_after: float | None = None) -> FileState:
    try:
        status = os.stat(path)
    except OSError:
        return _MISSING
    if recent_after is not None and status.st_mtime > recent_after:
        return _RECENT
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size


def skip_bytecode_of_recent_sources() -> None:
    """Have the import system write no bytecode for a source file that was written less than _RECENT_S seconds ago.
    Python matches bytecode and source by time in seconds and by size: of two versions written within one second with
    the same size, it would run the first."""
    SourceFileLoader.set_data = _write_old_sources_bytecode  # type: ignore[method-assign, assignment]


_original_set_data = SourceFileLoader.set_data


def _write_old_sources_bytecode(self: SourceFileLoader, path: str, data: bytes, *, _mode: int = 0o666) -> None:
    if _file_state(source_from_cache(path), time.time() - _RECENT_S) not in (_MISSING, _RECENT):
        _original_set_data(self, path, data, _mode=_mode)
