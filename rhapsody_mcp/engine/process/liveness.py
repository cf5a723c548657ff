"""Finds processes that were stopped (with SIGSTOP) and not continued."""

from __future__ import annotations

from collections.abc import Iterable

from rhapsody_mcp.engine.process.tree import stat_fields

__all__ = ["MIN_CHECKS", "StopDetector", "is_stopped"]

MIN_CHECKS = 5
"""The number of successive checks that must find a process stopped. Checks are counted, not seconds: while a machine
sleeps, all processes stand still, but no check runs."""


class StopDetector:
    """Counts for each process the successive checks that found it stopped."""

    def __init__(self) -> None:
        self._stopped: dict[int, int] = {}

    def check(self, pids: Iterable[int]) -> set[int]:
        """Check the processes; return those that the last MIN_CHECKS checks found stopped."""
        self._stopped = {pid: self._stopped.get(pid, 0) + 1 for pid in pids if is_stopped(pid)}
        return {pid for pid, checks in self._stopped.items() if checks >= MIN_CHECKS}


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped now; False for a process that a debugger traces, and on systems without
    /proc."""
    return stat_fields(pid)[:1] == [b"T"]
