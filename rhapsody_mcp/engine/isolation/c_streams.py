"""What C, C++ and Fortran code of this process has printed and holds in buffers that Python does not know of."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

__all__ = ["buffer_lines", "flush"]

_LIBC = ctypes.CDLL(None)
_LINE_BUFFERED = 1  # _IOLBF, stdio.h
_STREAMS = ("stdout", "stderr") if sys.platform == "linux" else ("__stdoutp", "__stderrp")
_FORTRAN, _CPP = "libgfortran", "libstdc++"


def buffer_lines() -> None:
    """Have C write out each line when it ends, as it does into a terminal: a crash then loses none. To be called before
    anything is printed."""
    for name in _STREAMS:
        _LIBC.setvbuf(ctypes.c_void_p.in_dll(_LIBC, name), None, _LINE_BUFFERED, ctypes.c_size_t(0))


def flush(look: bool = True) -> None:
    """Write out what the three languages hold, also that of libraries that were loaded since the last `look`."""
    if look and _Loaded.have_changed():
        _flushes[:] = _find_flushes()
    for write_out in _flushes:
        write_out()
    _LIBC.fflush(None)


_flushes: list[Callable[[], object]] = []


class _Object(ctypes.Structure):
    """struct dl_phdr_info, link.h."""

    _fields_ = (
        ("address", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("header_count", ctypes.c_uint16),
        ("ever_loaded", ctypes.c_ulonglong),
    )


_VISIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Object), ctypes.c_size_t, ctypes.c_void_p)


class _Loaded:
    """The shared libraries of this process; the count of all that were ever loaded tells whether there are new ones."""

    count = 0
    seen = 0

    @classmethod
    def have_changed(cls) -> bool:
        if sys.platform != "linux":
            return False
        _LIBC.dl_iterate_phdr(_COUNT, None)
        changed, cls.seen = cls.seen != cls.count, cls.count
        return changed


def _count(loaded: ctypes._Pointer[_Object], _size: int, _data: object) -> int:
    _Loaded.count = loaded.contents.ever_loaded
    return 1  # the first tells it


_COUNT = _VISIT(_count)


def _find_flushes() -> list[Callable[[], object]]:
    paths: list[str] = []

    def note(loaded: ctypes._Pointer[_Object], _size: int, _data: object) -> int:
        paths.append((loaded.contents.name or b"").decode("utf-8", "replace"))
        return 0

    _LIBC.dl_iterate_phdr(_VISIT(note), None)
    found: list[Callable[[], object]] = []
    for path in paths:
        name = path.rpartition("/")[2]
        if name.startswith(_FORTRAN):
            found.append(_fortran_flush(path))
        elif name.startswith(_CPP):
            found += _cpp_flushes(path)
    return found


def _fortran_flush(path: str) -> Callable[[], object]:
    every_unit = ctypes.CDLL(path)._gfortran_flush_i4
    return lambda: every_unit(None)


def _cpp_flushes(path: str) -> list[Callable[[], object]]:
    """std::ostream::flush of std::cout and std::clog, once some code has made them; std::cerr holds nothing back."""
    library = ctypes.CDLL(path)
    flush_stream = library._ZNSo5flushEv
    flush_stream.argtypes, flush_stream.restype = (ctypes.c_void_p,), ctypes.c_void_p

    def of(name: str) -> Callable[[], object]:
        table = ctypes.c_void_p.in_dll(library, name)  # its first word, null until it is made
        return lambda: table and flush_stream(ctypes.addressof(table))

    return [of("_ZSt4cout"), of("_ZSt4clog")]
