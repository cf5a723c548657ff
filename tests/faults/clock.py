"""Runs rhapsody_mcp with a clock that another process sets.

    python clock.py FILE ARGUMENTS...

Only what reads `time.time` and `time.time_ns` sees it, in this process alone.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

__all__ = ["Clock"]

_AHEAD, _READ = 0, 8


class Clock:
    """The file holds how many seconds it is ahead, and what was read from it last."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.exists():
            file.write_bytes(bytes(16))
        with file.open("r+b") as opened:
            self._held = mmap.mmap(opened.fileno(), 0)

    def set(self, ahead_s: float) -> None:
        struct.pack_into("d", self._held, _AHEAD, ahead_s)

    def read(self, real: float) -> float:
        """What it shows at this time."""
        shown: float = real + struct.unpack_from("d", self._held, _AHEAD)[0]
        struct.pack_into("d", self._held, _READ, shown)
        return shown

    @property
    def last_read(self) -> float:
        return float(struct.unpack_from("d", self._held, _READ)[0])


def main() -> None:
    clock, real = Clock(Path(sys.argv[1])), time.time
    time.time = lambda: clock.read(real())
    time.time_ns = lambda: int(clock.read(real()) * 1e9)
    sys.argv = ["rhapsody-mcp", *sys.argv[2:]]
    runpy.run_module("rhapsody_mcp", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
