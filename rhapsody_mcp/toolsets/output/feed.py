"""The whole output of a task as text, from its first byte on while the task runs to its last when it has ended."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread

from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.values import Stream, gap_note
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.toolsets.output.live import STREAMS, OutputReader

__all__ = ["OutputFeed", "StreamText", "printed_by"]

_new_decoder = codecs.getincrementaldecoder("utf-8")


class OutputFeed:
    """What a rank of a task prints, each byte once. A later attempt begins at its first byte, and on a new line."""

    def __init__(self, session: Session, task: Task, rank: int = 0) -> None:
        self._session, self._task, self._rank = session, task, rank
        self._ended_attempt: int | None = None
        self._begin()

    def _begin(self) -> None:
        self._reader = OutputReader(self._session, self._task, self._rank)
        self._texts = [StreamText(), StreamText()]

    @property
    def is_over(self) -> bool:
        """Whether all was given that the task has printed until its end."""
        return self._ended_attempt == self._task.attempts

    async def pieces(self, max_bytes: int) -> AsyncIterator[tuple[int, str]]:
        """What is new, each piece with the index of its stream: of a running task at most so many bytes of each stream,
        of one that has ended the rest."""
        if self._reader.is_outdated:
            for index, text in enumerate(self._texts):
                yield index, text.closed()
            self._begin()
        if self._task.outcome is None:
            for index, data in enumerate(await self._reader.read(max_bytes) or ()):
                yield index, self._texts[index].decoded(data)
        elif not self.is_over:
            attempt, printed = self._task.attempts, printed_by(self._task.outcome, self._rank)
            for index, (name, read) in enumerate(zip(STREAMS, self._reader.ends, strict=True)):
                async for piece in self._texts[index].rest(getattr(printed, name), read, max_bytes):
                    yield index, piece
            self._ended_attempt = attempt


def printed_by(outcome: Outcome, rank: int) -> Outcome | RankOutcome:
    """The holder of the stdout and stderr of a rank."""
    return outcome.ranks[rank] if rank < len(outcome.ranks) else outcome


class StreamText:
    """Decodes a stream piece by piece, and finds its rest in what was kept of it."""

    def __init__(self) -> None:
        self._decoder = _new_decoder("replace")
        self._chars = 0
        self._ends_line = True

    def decoded(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        self._chars += len(text)
        self._ends_line = text.endswith("\n") if text else self._ends_line
        return text

    def closed(self) -> str:
        """The end of what was decoded, and of its last line."""
        text = self._decoder.decode(b"", final=True)
        return text if self._ends_line and not text else f"{text}\n"

    async def rest(self, stream: Stream, read: int, max_bytes: int) -> AsyncIterator[str]:
        """Yield what follows the `read` bytes that were decoded or left out while the task ran; of an output that is
        shorter, as the task was started anew, all."""
        if _printed_bytes(stream) < read:
            yield self.closed()
            self._chars = read = 0
        if stream.file is None:
            yield self._rest_in_text(stream, read)
            return
        at = _position(stream, read)
        try:
            while data := await anyio.to_thread.run_sync(_piece, stream.file, at, max_bytes):
                at += len(data)
                yield self.decoded(data)
            yield self._decoder.decode(b"", final=True)
        except OSError:
            yield f"[its file, {stream.file}, is gone]\n{stream.text}"

    def _rest_in_text(self, stream: Stream, read: int) -> str:
        """In the text, a byte that is not UTF-8 takes three: characters are counted, not bytes."""
        if read >= _printed_bytes(stream):
            return self._decoder.decode(b"", final=True)
        note = gap_note(stream.left_out).decode()
        head, _, tail = stream.text.partition(note)
        gap = (stream.size - len(note)) // 2 if head else 0
        if not stream.left_out or read <= gap:
            return stream.text[self._chars :]
        if read < gap + stream.left_out:
            return note + tail
        return _end_of(tail, _printed_bytes(stream) - read)


def _printed_bytes(stream: Stream) -> int:
    """The size of the whole, with what was left out."""
    return stream.size - len(gap_note(stream.left_out)) + stream.left_out if stream.left_out else stream.size


def _end_of(text: str, size: int) -> str:
    """The last bytes of a text, of which each replacement character is taken for one byte."""
    at = len(text)
    while at and size > 0:
        at -= 1
        size -= 1 if text[at] == "\ufffd" else len(text[at].encode())
    return text[at:]


def _position(stream: Stream, read: int) -> int:
    """Where the file with what was kept goes on after `read` bytes of the whole."""
    if not stream.left_out:
        return read
    note = gap_note(stream.left_out)
    gap = (stream.size - len(note)) // 2
    if read < gap + stream.left_out:
        return min(read, gap)
    return read - stream.left_out + len(note)


def _piece(file: str, start: int, max_bytes: int) -> bytes:
    with Path(file).open("rb") as opened:
        opened.seek(start)
        return opened.read(max_bytes)
