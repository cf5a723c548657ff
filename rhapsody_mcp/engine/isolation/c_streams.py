"""Flushes the output buffers of C, C++ and Fortran in this process, which Python does not flush."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

__all__ = ["buffer_lines", "flush"]

_LIBC = ctypes.CDLL(None)
_LINE_BUFFERED = 1  # _IOLBF, stdio.h
_STREAMS = ("stdout", "stderr") if sys.platform == "linux" else ("__stdoutp", "__stderrp")
_FORTRAN_LIBRARY, _CPP_LIBRARY = "libgfortran", "libstdc++"


def buffer_lines() -> None:
    """Set C's stdout and stderr to line buffering, so that a crash loses no complete line. Call it before anything is
    printed."""
    for name in _STREAMS:
        _LIBC.setvbuf(ctypes.c_void_p.in_dll(_LIBC, name), None, _LINE_BUFFERED, ctypes.c_size_t(0))


def flush(find_new_libraries: bool = True) -> None:
    """Flush the buffers of the three languages. With `find_new_libraries`, include libraries that were loaded since the
    last search."""
    if find_new_libraries and _LoadedLibraries.have_changed():
        _flush_functions[:] = _find_flush_functions()
    for flush_streams in _flush_functions:
        flush_streams()
    _LIBC.fflush(None)


_flush_functions: list[Callable[[], object]] = []


class _LibraryInfo(ctypes.Structure):
    """struct dl_phdr_info, link.h."""

    _fields_ = (
        ("address", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("header_count", ctypes.c_uint16),
        ("ever_loaded", ctypes.c_ulonglong),
    )


_VISIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LibraryInfo), ctypes.c_size_t, ctypes.c_void_p)


class _LoadedLibraries:
    """The shared libraries of this process. libc counts every load, so that a changed count means new libraries."""

    count = 0
    last_count = 0

    @classmethod
    def have_changed(cls) -> bool:
        if sys.platform != "linux":
            return False
        _LIBC.dl_iterate_phdr(_READ_LOAD_COUNT, None)
        changed, cls.last_count = cls.last_count != cls.count, cls.count
        return changed


def _read_load_count(loaded: ctypes._Pointer[_LibraryInfo], _size: int, _data: object) -> int:
    _LoadedLibraries.count = loaded.contents.ever_loaded
    return 1  # stop: every entry holds the same count


_READ_LOAD_COUNT = _VISIT(_read_load_count)


def _find_flush_functions() -> list[Callable[[], object]]:
    paths: list[str] = []

    def add_path(loaded: ctypes._Pointer[_LibraryInfo], _size: int, _data: object) -> int:
        paths.append((loaded.contents.name or b"").decode("utf-8", "replace"))
        return 0

    _LIBC.dl_iterate_phdr(_VISIT(add_path), None)
    functions: list[Callable[[], object]] = []
    for path in paths:
        name = path.rpartition("/")[2]
        if name.startswith(_FORTRAN_LIBRARY):
            functions.append(_fortran_flush(path))
        elif name.startswith(_CPP_LIBRARY):
            functions += _cpp_flush_functions(path)
    return functions


def _fortran_flush(path: str) -> Callable[[], object]:
    every_unit = ctypes.CDLL(path)._gfortran_flush_i4
    return lambda: every_unit(None)


def _cpp_flush_functions(path: str) -> list[Callable[[], object]]:
    """Return std::ostream::flush for std::cout and for std::clog, which do nothing before C++ has created these
    streams. std::cerr is not buffered."""
    library = ctypes.CDLL(path)
    flush_stream = library._ZNSo5flushEv
    flush_stream.argtypes, flush_stream.restype = (ctypes.c_void_p,), ctypes.c_void_p

    def flush_function(name: str) -> Callable[[], object]:
        # the first word of the stream object is null before C++ has created the stream
        table = ctypes.c_void_p.in_dll(library, name)
        return lambda: table and flush_stream(ctypes.addressof(table))

    return [flush_function("_ZSt4cout"), flush_function("_ZSt4clog")]
