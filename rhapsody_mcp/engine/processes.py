"""Finds and ends processes: by what they descend from, and by a mark in their environment."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

__all__ = [
    "ENGINE",
    "LIFELINE",
    "PLACE",
    "adopt_orphans",
    "descendants",
    "end",
    "group",
    "marked",
    "open_lifeline",
    "outlives",
    "reap",
]

ENGINE = "RHAPSODY_ENGINE"
"""Marks every process under a keeper; the value is the keeper's random id."""
PLACE = "RHAPSODY_PLACE"
"""Marks every process of one placed process; the value is the engine's id, a dot, and a number."""

LIFELINE = "RHAPSODY_LIFELINE"
"""Names a FIFO whose only writer is the keeper: its readers see end-of-file when that ends, however it ends."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """The living processes that descend from this one, parents first."""
    children: dict[int, list[int]] = {}
    for child, parent, _ in _living():
        children.setdefault(parent, []).append(child)
    found = list(children.get(pid, ()))
    for child in found:
        found.extend(children.get(child, ()))
    return found


def marked(name: str, value: str) -> list[int]:
    """The processes that were started with this environment variable: exactly this value, or it and a dot.

    A process that cleared its environment is not found.
    """
    exact = f"{name}={value}".encode()
    found = []
    for pid in _pids():
        with suppress(OSError):
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(entry == exact or entry.startswith(exact + b".") for entry in entries):
                found.append(pid)
    return found


def group(leader: int) -> list[int]:
    """The living processes of this process group."""
    return [pid for pid, _, number in _living() if number == leader]


def end(find: Callable[[], Iterable[int]], grace_s: float = 0.0, within_s: float = 5.0) -> None:
    """End the processes that `find` names, again and again until it names none: TERM first where there is a
    grace, then KILL. Gives up after `within_s` more seconds (a process in the kernel's hands cannot be killed)."""
    deadline = time.monotonic() + grace_s
    if grace_s:
        _signal(find(), signal.SIGTERM)
        while time.monotonic() < deadline and any(True for _ in find()):
            reap()
            time.sleep(0.01)
    while time.monotonic() < deadline + within_s:
        alive = [pid for pid in find() if pid != os.getpid()]
        if not alive:
            return
        _signal(alive, signal.SIGKILL)
        reap()
        time.sleep(0.005)


def outlives(pid: int, lifeline: int) -> bool:
    """Wait for this process's child to end, or for end-of-file on the lifeline; True where the child ends first.

    The child is not collected.
    """
    child = os.pidfd_open(pid) if sys.platform == "linux" else -1
    watched = [lifeline, child] if child >= 0 else [lifeline]
    try:
        while not _has_ended(pid):
            readable, _, _ = select.select(watched, [], [], None if child >= 0 else _POLL_S)
            if lifeline in readable and not os.read(lifeline, 4096):
                return False
    except OSError:  # the lifeline was closed
        return False
    finally:
        if child >= 0:
            os.close(child)
    return True


_POLL_S = 0.2  # where the system has no descriptor for a process


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def open_lifeline() -> int:
    """The reading end of the keeper's lifeline, for a process under it; at end-of-file where the keeper is gone."""
    try:
        lifeline = os.open(os.environ[LIFELINE], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.set_blocking(lifeline, True)
    return lifeline


def reap() -> None:
    """Collect this process's children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []


def _living() -> Iterable[tuple[int, int, int]]:
    """Each living process with its parent and its process group; zombies are left out."""
    if not os.path.isdir("/proc"):
        yield from _living_by_ps()
    for pid in _pids():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            if fields[0] not in (b"Z", b"X"):
                yield pid, int(fields[1]), int(fields[2])


def _living_by_ps() -> Iterable[tuple[int, int, int]]:
    import subprocess

    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, parent, number, state = line.split()
        if not state.startswith("Z"):
            yield int(pid), int(parent), int(number)
