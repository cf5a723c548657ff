"""Notices processes that somebody has stopped (with SIGSTOP) and does not let go on."""

from __future__ import annotations

from collections.abc import Iterable

from rhapsody_mcp.engine.process.tree import stat_fields

__all__ = ["LOOKS", "Stalls", "is_stopped"]

LOOKS = 5
"""So many looks must find a process stopped, one after the other. They are counted, and not the time: a machine that
slept has stopped everything, and looks at nothing meanwhile."""


class Stalls:
    """Remembers what the last looks found."""

    def __init__(self) -> None:
        self._stopped: dict[int, int] = {}

    def look(self, pids: Iterable[int]) -> set[int]:
        """Those of these processes that this look and the ones before it found stopped."""
        self._stopped = {pid: self._stopped.get(pid, 0) + 1 for pid in pids if is_stopped(pid)}
        return {pid for pid, looks in self._stopped.items() if looks >= LOOKS}


def is_stopped(pid: int) -> bool:
    """Whether it is stopped now; never true of one that a debugger traces, or where the system does not tell."""
    return stat_fields(pid)[:1] == [b"T"]
