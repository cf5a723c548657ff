"""The files that processes print into, kept small while they print."""

from __future__ import annotations

import _thread
import os
import time

TYPE_CHECKING = False  # few imports: the supervisor of every program imports this
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["STREAMS", "Trimmer", "middle", "open_output"]

STREAMS = ("out", "err")
"""What the names of the two files end with."""
_BLOCK = 4096
_LOOK_S, _LOOK_AGAIN_S = 0.2, 0.01
_PUNCH_HOLE = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h


def open_output(path: str) -> int:
    """A new file for a process to print into."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)


class Trimmer:
    """Frees the disk of what is in the middle of files whenever they are longer than they may be, in a thread.

    Whoever writes is not held up. A file may take more for as long as it takes to look.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._most = 0
        self._looks = self._runs = False
        self._lock = _thread.allocate_lock()

    def watch(self, files: Sequence[int], most: int) -> None:
        """Until `leave`."""
        self._sizes, self._most, self._looks = dict.fromkeys(files, 0), most, True
        if self._runs:
            self._lock.release()
        else:
            self._runs = True
            _thread.start_new_thread(self._work, ())

    def leave(self) -> None:
        """Afterwards the files may be closed."""
        if self._looks:
            self._lock.acquire()
            self._looks = False

    def _work(self) -> None:
        while True:
            with self._lock:
                growing = sum(map(self._look, self._sizes)) > 0
            time.sleep(_LOOK_AGAIN_S if growing else _LOOK_S)

    def _look(self, file: int) -> bool:
        """Whether it grows beyond what it may be."""
        try:
            growing = os.fstat(file).st_size > max(self._most, self._sizes[file])
            if growing:
                _trim(file, self._most)
            self._sizes[file] = os.fstat(file).st_size
        except OSError:  # a full disk; the next look may find room
            return False
        return growing


def _trim(file: int, most: int) -> None:
    start, end = middle(os.fstat(file).st_size, most)
    first, last = -(-start // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
    if not _punch(file, first, last - first):
        os.ftruncate(file, first)
        os.write(file, b"\n[left out]\n")


def middle(size: int, most: int) -> tuple[int, int]:
    """What of a long output is left out: half of what is kept is its beginning, half its end."""
    return most // 2, size - (most - most // 2)


def _punch(file: int, start: int, length: int) -> bool:
    """Make a hole in a file, which takes no disk. False where the system or the file system cannot."""
    import ctypes

    try:
        punch = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return False
    result: int = punch(file, _PUNCH_HOLE, ctypes.c_longlong(start), ctypes.c_longlong(length)) if length > 0 else 0
    return result == 0
