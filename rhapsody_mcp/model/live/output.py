"""What a running task has printed so far, read in pieces."""

from __future__ import annotations

import msgspec

__all__ = ["OutputPart", "OutputQuery", "Printed"]


class OutputQuery(msgspec.Struct, frozen=True, gc=False):
    """A piece of the stdout and of the stderr of a rank, at most `max_bytes` of each.

    `starts` are the first bytes, of stdout and of stderr; a negative number counts from the end.
    """

    starts: tuple[int, int] = (0, 0)
    max_bytes: int = 64 * 1024
    rank: int = 0


class OutputPart(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The bytes from `start` of an output that has `size` bytes now.

    Of an output over the limit, the bytes from `gap[0]` to `gap[1]` are not kept, and no part has them: a part that
    would begin in the gap begins after it.
    """

    start: int = 0
    data: bytes = b""
    size: int = 0
    gap: tuple[int, int] = (0, 0)

    @property
    def end(self) -> int:
        return self.start + len(self.data)


Printed = tuple[OutputPart, OutputPart]
"""Of stdout and of stderr."""
