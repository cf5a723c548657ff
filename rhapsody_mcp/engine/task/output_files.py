"""The pipe that a program prints into, and the file that keeps what came through it, bounded while the program runs.

A pipe and not the file itself: a program that opens /dev/stdout anew would truncate a file.
"""

from __future__ import annotations

import os  # and little else: the supervisor of every program imports this

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableSequence

__all__ = ["MOVES", "STREAMS", "Output", "middle", "shared_count"]

STREAMS = ("out", "err")
"""What the names of the two files end with."""
MOVES = "moves"
"""What the name of the file ends with that a worker and its supervisor share a count in."""
_BLOCK = 4096
_PIECE = 1 << 20
_PIECES_A_TURN = 16  # a program that never stops printing must not keep its supervisor from all else
_PUNCH_HOLE = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h


class Output:
    """One of the two streams of a program. `most` bounds the disk that its file takes, up to a quarter more.

    The number in `moves`, which others may look at, grows by one before something is taken out of the pipe, and by one
    more when it is in the file.
    """

    def __init__(self, path: str, most: int | None, moves: MutableSequence[int]) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.reader, self.writer = _pipe_named(f"{path}.pipe")
        self._most, self._moves, self._trimmed = most, moves, 0

    def started(self) -> None:
        """The program has its end of the pipe."""
        os.close(self.writer)
        self.writer = -1

    def drain(self) -> bool:
        """Keep what is in the pipe now, or much of it; False where nobody will write into it any more."""
        try:
            for _ in range(_PIECES_A_TURN):
                if not self._move():
                    return False
                self._trim()
        except BlockingIOError:
            return True
        return True

    def _move(self) -> bool:
        """False where the pipe has come to its end."""
        self._moves[0] += 1
        try:
            data = os.read(self.reader, _PIECE)
            if data:
                self._keep(data)
        finally:
            self._moves[0] += 1
        return bool(data)

    def _keep(self, data: bytes) -> None:
        try:
            while data := data[os.write(self._file, data) :]:
                continue
        except OSError:  # the disk is full: what comes now is lost, and the program goes on
            return

    def _trim(self) -> None:
        """Free the disk of what is in the middle, where the file is longer than it may be."""
        if self._most is None:
            return
        size = os.fstat(self._file).st_size
        if size < self._trimmed:  # a worker has emptied it
            self._trimmed = 0
        if size > self._most and size - self._trimmed > self._most // 4:
            _trim(self._file, self._most)
            self._trimmed = os.fstat(self._file).st_size

    def close(self) -> None:
        for descriptor in (self.reader, self.writer, self._file):
            if descriptor >= 0:
                os.close(descriptor)


def _pipe_named(path: str) -> tuple[int, int]:
    """The two ends of a pipe whose name, which nobody finds any more, says of each process that has it whose it is."""
    os.mkfifo(path, 0o600)
    try:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return reader, os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    finally:
        os.unlink(path)


def shared_count(path: str) -> MutableSequence[int]:
    """One number, at first 0, that every process sees which asks for it by this path."""
    import mmap

    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, 8)
        return memoryview(mmap.mmap(file, 8)).cast("Q")  # type: ignore[return-value]  # a sequence in all but name
    finally:
        os.close(file)


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
