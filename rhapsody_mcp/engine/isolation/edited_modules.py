"""Modules of the user's own that were edited after they were imported: they are imported anew."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import time
from importlib.machinery import SourceFileLoader
from importlib.util import source_from_cache

__all__ = ["EditedModules", "keep_no_bytecode_of_new_files"]

_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_OURS = __name__.partition(".")[0]
State = tuple[int, ...]
_GONE: State = ()
_RECENT: State = (0,)
_RECENT_S = 2.0
"""A file that was written so short a time ago may be written again without a change of its time or its size."""


class EditedModules:
    """The user's own modules in `sys.modules`, as their files were when they were imported."""

    def __init__(self) -> None:
        self._standard = sysconfig.get_path("stdlib") + os.sep
        self._known, self._last = set(sys.modules), next(reversed(sys.modules))
        self._files: dict[str, tuple[str, State]] = {}
        """By the module's name, its file, and how that was."""

    def note(self) -> None:
        """Look at what was imported since the last time."""
        if next(reversed(sys.modules)) == self._last:
            return
        for name in sys.modules.keys() - self._known:
            path = getattr(sys.modules[name], "__file__", None)
            if isinstance(path, str) and path.endswith(".py") and self._is_users(name, path):
                self._files[name] = path, _state(path, time.time() - _RECENT_S)
        self._known, self._last = set(sys.modules), next(reversed(sys.modules))

    def _is_users(self, name: str, path: str) -> bool:
        installed = path.startswith(self._standard) or any(part in path for part in _INSTALLED)
        return not installed and name.partition(".")[0] != _OURS

    def drop(self) -> None:
        """Where one was edited, have all be imported anew: they may have taken something from each other."""
        if all(_state(path) == state for path, state in self._files.values()):
            return
        for name in self._files:
            sys.modules.pop(name, None)
        self._files.clear()
        self._known, self._last = set(sys.modules), next(reversed(sys.modules))
        importlib.invalidate_caches()


def _state(path: str, before: float | None = None) -> State:
    try:
        found = os.stat(path)
    except OSError:
        return _GONE
    if before is not None and found.st_mtime > before:
        return _RECENT
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def keep_no_bytecode_of_new_files() -> None:
    """Python takes bytecode for that of its source by the second and the size; what is written twice in one second with
    one size would run as it was the first time."""
    SourceFileLoader.set_data = _set_data  # type: ignore[method-assign, assignment]


_write = SourceFileLoader.set_data


def _set_data(self: SourceFileLoader, path: str, data: bytes, *, _mode: int = 0o666) -> None:
    if _state(source_from_cache(path), time.time() - _RECENT_S) not in (_GONE, _RECENT):
        _write(self, path, data, _mode=_mode)
