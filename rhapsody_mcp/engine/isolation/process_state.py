"""Saves the state of this process, and restores it after each function."""

from __future__ import annotations

import _locale
import _socket
import builtins
import copy
import faulthandler
import fcntl
import gc
import os
import resource
import sys
import threading
import time
import warnings
from functools import partial
from operator import call, itemgetter
from typing import TYPE_CHECKING, Any

from rhapsody_mcp.engine.isolation import library_state
from rhapsody_mcp.engine.isolation.library_state import Part

if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # the functions of signal look up an enum each time

__all__ = ["ProcessState"]

_SIGNALS = sorted({*range(1, 32)} & {*_signal.valid_signals()} - {_signal.SIGKILL, _signal.SIGSTOP})
_STREAMS = (0, 1, 2)
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_FIRST_COPY_DESCRIPTOR = 200
_reset_shown_warnings = getattr(warnings, "_filters_mutated", lambda: None)
"""Has Python show a warning again that it has shown to an earlier function."""


class ProcessState:
    """The state of the process at the creation of this object, as far as a function can change it and a later function
    would notice.

    Changes in imported modules are not restored, except for the libraries in `library_state`.
    """

    def __init__(self) -> None:
        sys.modules.pop("resource", None)  # if user code imports it again, `_limits` reads the limits
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a crash then loses no line
        self._descriptors = [_copy_descriptor(number) for number in _STREAMS]
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        library_state.reseed()
        parts = (*_PARTS, *library_state.PARTS)
        self._readers, self._writers = [read for read, _ in parts], [write for _, write in parts]
        self._saved = [copy.copy(read()) for read in self._readers]

    def flush(self) -> None:
        """Flush Python's stdout and stderr."""
        for stream in {sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__}:
            try:
                stream.flush()  # type: ignore[union-attr]
            except Exception:  # the function may have closed or replaced the stream
                continue

    def restore(self) -> bool:
        """Restore the saved state; return False if a part cannot be restored, so that the process must be replaced."""
        _signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        os.umask(self._umask)
        library_state.reseed()
        _reset_shown_warnings()
        is_restored = self._restore_descriptors()
        try:
            if list(map(call, self._readers)) == self._saved:  # the usual case, and faster than one comparison per part
                return is_restored
        except Exception:  # a closed stream
            pass
        return self._restore_parts() and is_restored

    def _restore_parts(self) -> bool:
        is_restored = True
        for read, write, saved in zip(self._readers, self._writers, self._saved, strict=True):
            try:
                if read() != saved:
                    write(saved)
                    is_restored = is_restored and read() == saved
            except Exception:  # a closed stream, a limit that only root may raise
                is_restored = False
        return is_restored

    def _restore_descriptors(self) -> bool:
        try:
            for number, kept in enumerate(self._descriptors):
                os.dup2(kept, number)
            if not (os.get_blocking(1) and os.get_blocking(2)):
                os.set_blocking(1, True)
                os.set_blocking(2, True)
        except OSError:  # the function has closed all descriptors
            return False
        return True


def _copy_descriptor(descriptor: int) -> int:
    """Return a copy with a number of at least 200, because some functions close the next few numbers."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_COPY_DESCRIPTOR)


def _set_environment(saved: dict[bytes, bytes]) -> None:
    os.environb.clear()
    os.environb.update(saved)
    time.tzset()


def _set_list(kept: list[Any], saved: list[Any]) -> None:
    kept[:] = saved


def _hooks() -> list[object]:
    return [
        *(sys.stdin, sys.stdout, sys.stderr, warnings.showwarning),
        *(sys.excepthook, sys.displayhook, sys.unraisablehook, sys.breakpointhook),
    ]


def _set_hooks(saved: list[Any]) -> None:
    sys.stdin, sys.stdout, sys.stderr, warnings.showwarning = saved[:4]
    sys.excepthook, sys.displayhook, sys.unraisablehook, sys.breakpointhook = saved[4:]


def _streams() -> list[object]:
    out: Any = sys.stdout
    err: Any = sys.stderr
    return [
        *(out.encoding, err.encoding, out.errors, err.errors, out.closed, err.closed, sys.stdin.closed),
        *(out.line_buffering, err.line_buffering, len(vars(out)), len(vars(err))),
    ]


def _set_streams(saved: list[Any]) -> None:
    for stream, encoding, errors in ((sys.stdout, saved[0], saved[2]), (sys.stderr, saved[1], saved[3])):
        for name in vars(stream).keys() - {"mode"}:  # methods that the function has replaced
            delattr(stream, name)
        stream.reconfigure(encoding=encoding, errors=errors, line_buffering=True)  # type: ignore[union-attr]


def _handlers() -> list[object]:
    return list(map(_signal.getsignal, _SIGNALS))


def _set_handlers(saved: list[Any]) -> None:
    # a function that set a timer has also set a handler for its signal
    for timer in (_signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF):
        _signal.setitimer(timer, 0)
    for number, handler in zip(_SIGNALS, saved, strict=True):
        if _signal.getsignal(number) != handler:
            _signal.signal(number, handler)


def _builtins() -> tuple[int, object]:
    """Return the number of builtins, and those that users are likely to replace: this takes 2 us."""
    return len(_BUILTINS), _replaceable(_BUILTINS)


_BUILTINS = vars(builtins)
_replaceable = itemgetter(
    *("print", "open", "input", "__import__", "sum", "len", "max", "min", "abs", "round", "sorted", "range", "zip"),
    *("map", "filter", "enumerate", "any", "all", "isinstance", "hash", "id", "repr", "int", "float", "str", "list"),
    *("dict", "set", "tuple", "exec", "eval"),
)


def _set_builtins(_: object) -> None:
    for name in _BUILTINS.keys() - _ORIGINAL_BUILTINS.keys():
        del _BUILTINS[name]
    _BUILTINS.update(_ORIGINAL_BUILTINS)


_ORIGINAL_BUILTINS = _BUILTINS.copy()


def _interpreter() -> list[Any]:
    return [
        *(gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit(), sys.get_int_max_str_digits()),
        *(sys.getswitchinterval(), sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()),
        *(gc.callbacks[:], gc.get_debug(), _socket.getdefaulttimeout()),
    ]


def _set_interpreter(saved: list[Any]) -> None:
    is_collecting, thresholds, depth, digits, interval, tracer, profiler = saved[:7]
    (gc.enable if is_collecting else gc.disable)()
    gc.set_threshold(*thresholds)
    sys.setrecursionlimit(depth)
    sys.set_int_max_str_digits(digits)
    sys.setswitchinterval(interval)
    sys.settrace(tracer)
    sys.setprofile(profiler)
    threading.settrace(saved[7])
    threading.setprofile(saved[8])
    gc.callbacks[:] = saved[9]
    gc.set_debug(saved[10])
    _socket.setdefaulttimeout(saved[11])


def _users() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return os.getresuid(), os.getresgid()


def _set_users(saved: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    os.setresuid(*saved[0])  # first: it may restore the right to change the groups
    os.setresgid(*saved[1])


def _limits() -> list[tuple[int, int]]:
    """Read the limits only if a module that can change them is loaded."""
    if "resource" in sys.modules or "psutil" in sys.modules:
        return _read_limits()
    return _ORIGINAL_LIMITS


def _read_limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(limit) for limit in _LIMITS]


def _set_limits(saved: list[tuple[int, int]]) -> None:
    for limit, values in zip(_LIMITS, saved, strict=True):
        resource.setrlimit(limit, values)


def _locale_name() -> str:
    return _locale.setlocale(_locale.LC_ALL) if "locale" in sys.modules else _ORIGINAL_LOCALE


_ORIGINAL_LIMITS, _ORIGINAL_LOCALE = _read_limits(), _locale.setlocale(_locale.LC_ALL)

_PARTS: list[Part] = [
    (_hooks, _set_hooks),
    (_streams, _set_streams),
    (lambda: os.environ._data, _set_environment),  # type: ignore[attr-defined]  # a copy takes 30 us
    (lambda: sys.path, partial(_set_list, sys.path)),
    (lambda: sys.argv, partial(_set_list, sys.argv)),
    (lambda: sys.meta_path, partial(_set_list, sys.meta_path)),
    (lambda: sys.path_hooks, partial(_set_list, sys.path_hooks)),
    (_handlers, _set_handlers),
    (partial(_signal.pthread_sigmask, _signal.SIG_BLOCK, ()), partial(_signal.pthread_sigmask, _signal.SIG_SETMASK)),
    (_builtins, _set_builtins),
    (_locale_name, partial(_locale.setlocale, _locale.LC_ALL)),
    (lambda: warnings.filters, lambda saved: _set_list(warnings.filters, saved)),  # type: ignore[arg-type]
    (_interpreter, _set_interpreter),
    (_limits, _set_limits),
]
if sys.platform == "linux":
    _PARTS.append((partial(os.sched_getaffinity, 0), partial(os.sched_setaffinity, 0)))
    _PARTS.append((_users, _set_users))
