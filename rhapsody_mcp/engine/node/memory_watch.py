"""Measures the memory of tasks in processes of their own, and ends those that exceed theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from rhapsody_mcp.engine.node.supervised_process import SupervisedProcess

__all__ = ["LOOK_S", "WatchedProcess", "watch_memory"]

LOOK_S = 0.25
"""The least time from one look to the next, in seconds."""
_SHARE_OF_TIME = 20
"""The looks take at most a twentieth of a core, however many processes the node has."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class WatchedProcess(NamedTuple):
    """A process of a task. It is killed where it uses more than `limit` bytes; None for no limit."""

    process: SupervisedProcess
    supervisor: int
    limit: int | None


def watch_memory(find: Callable[[], list[WatchedProcess]]) -> None:
    """Repeatedly look at the processes that `find` returns. Never returns."""
    while True:
        if watched := find():
            began = time.monotonic()
            with suppress(OSError):  # out of file descriptors: the next look may find some
                _look(watched)
            time.sleep(max(LOOK_S, _SHARE_OF_TIME * (time.monotonic() - began)))
        else:
            time.sleep(LOOK_S)


def _look(watched: Iterable[WatchedProcess]) -> None:
    children, resident, cpu_s = _processes()
    for process, supervisor, limit in watched:
        pids = _descendants(supervisor, children)
        process.cpu_s = max(process.cpu_s, sum(cpu_s[pid] for pid in pids))
        used = sum(resident[pid] for pid in pids)
        if limit is not None and used > limit:
            used = sum(_proportional(pid, resident[pid]) for pid in pids)  # shared memory counts once
        process.peak_memory_bytes = max(process.peak_memory_bytes, used)
        if limit is not None and used > limit and not process.kill_reason:
            process.exceeded_memory = used
            process.kill(
                f"used {used / 1e9:.3g} GB of memory, and was allowed {limit / 1e9:.3g} GB: give the task a larger "
                "memory_gb, or less work at a time"
            )


def _processes() -> tuple[dict[int, list[int]], dict[int, int], dict[int, float]]:
    """Return the children of each process, its resident memory in bytes, and its CPU seconds with those of the
    descendants that have ended."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    cpu_s: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat", "rb", buffering=0) as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if len(fields) > 21:
                children.setdefault(int(fields[1]), []).append(int(entry))
                resident[int(entry)] = int(fields[21]) * _PAGE
                cpu_s[int(entry)] = sum(map(int, fields[11:15])) / _TICKS
    return children, resident, cpu_s


def _descendants(pid: int, children: dict[int, list[int]]) -> list[int]:
    found = list(children.get(pid, ()))
    for child in found:
        found.extend(children.get(child, ()))
    return found


def _proportional(pid: int, resident: int) -> int:
    """Return the memory of a process in bytes, of which shared pages are split among those who share them."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return resident
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:")), resident)
