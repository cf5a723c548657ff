"""The pipe into which a program prints, and the file of bounded size that stores the data of the pipe while the program
runs.

The program gets a pipe, not the file: a program that opens /dev/stdout again would truncate the file.
"""

from __future__ import annotations

import os  # import little: the supervisor of every program imports this module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableSequence, Sequence

__all__ = ["CURRENT_TASK", "MOVE_COUNT", "STREAMS", "Output", "make_room", "middle", "punch_hole", "shared_count"]

STREAMS = ("out", "err")
"""Suffixes of the two output files."""
MOVE_COUNT = "moves"
"""Suffix of the file through which a supervisor and its worker share the count of moves."""
CURRENT_TASK = "task"
"""Suffix of the file in which a worker notes the uid of the function that it runs, before a NUL byte."""
_BLOCK = 4096
_PIECE = 1 << 20
_LOST = b"\n[... the disk was full: what was printed here is lost ...]\n"
_ROOM = 4 * _BLOCK
_PIECES_A_TURN = 16  # the supervisor has other work, also while a program prints without end
_PUNCH_HOLE = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h


class Output:
    """Stdout or stderr of a program. The file takes at most `max_bytes` of disk, and up to a quarter more for a short
    time.

    `move_counter` holds one number, which other processes may read. It grows by one before data is read from the pipe,
    and by one more when the data is in the file: an odd number means that data is moving.
    """

    def __init__(self, path: str, max_bytes: int | None, move_counter: MutableSequence[int]) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.reader, self.writer = _open_named_pipe(f"{path}.pipe")
        self._max_bytes, self._move_counter, self._trimmed = max_bytes, move_counter, 0
        self._is_full = False
        """Whether the disk was full at the last write."""
        self.has_unnoted_loss = False
        """Whether output was lost of which no line says so."""

    def close_writer(self) -> None:
        """Close the writing end, which the program has inherited."""
        os.close(self.writer)
        self.writer = -1

    def drain(self) -> bool:
        """Move data from the pipe into the file, at most 16 MiB; return False if no process can write into the pipe any
        more."""
        try:
            for _ in range(_PIECES_A_TURN):
                if not self._move_data():
                    return False
                self._trim()
        except BlockingIOError:
            return True
        return True

    def _move_data(self) -> bool:
        """Return False at the end of the pipe's data."""
        self._move_counter[0] += 1
        try:
            data = os.read(self.reader, _PIECE)
            if data:
                self._write(data)
        finally:
            self._move_counter[0] += 1
        return bool(data)

    def _write(self, data: bytes) -> None:
        try:
            while data := data[os.write(self._file, data) :]:
                continue
        except OSError:  # the disk is full: this output is lost, and the program continues
            if not self._is_full:
                self.note_loss(len(_LOST))
            self._is_full = True
            return
        self._is_full = False

    @property
    def size(self) -> int:
        return os.fstat(self._file).st_size

    def note_loss(self, cut: int = 0) -> None:
        """Put a line that says what is lost in the place of the last `cut` bytes of the file: behind them may be no
        room."""
        try:
            os.ftruncate(self._file, max(0, self.size - cut))
            os.write(self._file, _LOST)
            self.has_unnoted_loss = False
        except OSError:
            self.has_unnoted_loss = True

    def _trim(self) -> None:
        """Free the disk blocks in the middle of the file, if the file is longer than the limit."""
        if self._max_bytes is None:
            return
        size = os.fstat(self._file).st_size
        if size < self._trimmed:  # a worker has truncated the file
            self._trimmed = 0
        if size > self._max_bytes and size - self._trimmed > self._max_bytes // 4:
            _trim(self._file, self._max_bytes)
            self._trimmed = os.fstat(self._file).st_size

    def close(self) -> None:
        for descriptor in (self.reader, self.writer, self._file):
            if descriptor >= 0:
                os.close(descriptor)


def make_room(outputs: Sequence[Output]) -> None:
    """Free some blocks of a full disk at the end of the longest output, and note what the others have lost."""
    for output in sorted(outputs, key=lambda output: -output.size)[:1]:
        output.note_loss(_ROOM)
    for output in outputs:
        if output.has_unnoted_loss:
            output.note_loss()


def _open_named_pipe(path: str) -> tuple[int, int]:
    """Return the two ends of a pipe. Its name is deleted at once, but /proc shows the name for each process that has
    the pipe open."""
    os.mkfifo(path, 0o600)
    try:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return reader, os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    finally:
        os.unlink(path)


def shared_count(path: str) -> MutableSequence[int]:
    """Return a sequence of one number, initially 0. All processes that call this function with the same path share the
    number."""
    import mmap

    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, 8)
        return memoryview(mmap.mmap(file, 8)).cast("Q")  # type: ignore[return-value]  # a sequence in all but name
    finally:
        os.close(file)


def _trim(file: int, max_bytes: int) -> None:
    start, end = middle(os.fstat(file).st_size, max_bytes)
    first, last = -(-start // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
    if not punch_hole(file, first, last - first):
        os.ftruncate(file, first)
        os.write(file, b"\n[left out]\n")


def middle(size: int, max_bytes: int) -> tuple[int, int]:
    """Return the range of bytes to leave out: the kept bytes are half at the beginning, half at the end."""
    return max_bytes // 2, size - (max_bytes - max_bytes // 2)


def punch_hole(file: int, start: int, length: int) -> bool:
    """Make a hole in a file, which frees the disk blocks; return False if the system or the file system cannot."""
    import ctypes

    try:
        punch = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return False
    result: int = punch(file, _PUNCH_HOLE, ctypes.c_longlong(start), ctypes.c_longlong(length)) if length > 0 else 0
    return result == 0
