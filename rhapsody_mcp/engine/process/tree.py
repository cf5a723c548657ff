"""Finds and ends processes: by what they descend from, and by a mark in their environment.

It imports little, because the supervisor of every program imports it: `signal` alone takes 3 ms.
"""

from __future__ import annotations

import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Container, Iterable, Sequence

    from rhapsody_mcp.engine.task.output_files import Output
else:
    import _signal as signal

__all__ = [
    "ENGINE",
    "LIFELINE",
    "PROCESS_MARK",
    "adopt_orphans",
    "arguments",
    "descendants",
    "end",
    "group",
    "groups_of",
    "has_children",
    "living",
    "marked",
    "open_lifeline",
    "outlives",
    "own_descendants",
    "programs_with",
    "reap",
    "relatives",
    "send_signal",
    "started_at",
    "stat_fields",
    "with_arguments",
    "writing_into",
]

ENGINE = "RHAPSODY_ENGINE"
"""Marks every process under a keeper; the value is the keeper's random id."""
PROCESS_MARK = "RHAPSODY_PLACE"
"""Marks a launched process and all that it starts; the value is the engine's mark, a dot, and a number."""

LIFELINE = "RHAPSODY_LIFELINE"
"""Names a FIFO whose only writer is the keeper: its readers see end-of-file when that ends, however it ends."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_prctl: list[Callable[..., int]] = []
"""The function, once it was looked up: that takes as long as five other system calls."""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        if not _prctl:
            import ctypes

            _prctl.append(ctypes.CDLL(None, use_errno=True).prctl)
        _prctl[0](_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def own_descendants() -> list[int]:
    """The living processes that descend from this one; one system call where it has no children."""
    return descendants(os.getpid()) if has_children() else []


def has_children() -> bool:
    """Whether this process has any, also ones that have ended and were not collected."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants(pid: int, but: Container[int] = ()) -> list[int]:
    """The living processes that descend from this one and from none of the others, parents first."""
    children: dict[int, list[int]] = {}
    for child, parent, _ in _living():
        if child not in but:
            children.setdefault(parent, []).append(child)
    pids_found = list(children.get(pid, ()))
    for child in pids_found:
        pids_found.extend(children.get(child, ()))
    return pids_found


def marked(name: str, value: str) -> list[int]:
    """The processes that were started with this environment variable: exactly this value, or it and a dot.

    A process that cleared its environment is not found.
    """
    exact = f"{name}={value}".encode()
    pids_found = []
    for pid in _pids():
        data = _read(pid, "environ")
        if exact in data and any(entry == exact or entry.startswith(exact + b".") for entry in data.split(b"\0")):
            pids_found.append(pid)
    return pids_found


def _read(pid: int, name: str) -> bytes:
    """What the kernel tells of a process in this file; nothing where there is no such process, or it is another's."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def writing_into(folder: str | os.PathLike[str]) -> list[int]:
    """The processes whose standard output or error is a file in this folder, also a deleted one. It finds some that
    cleared their environment."""
    inside = os.path.join(os.fspath(folder), "")
    return [pid for pid in _pids() if any(target.startswith(inside) for target in _outputs(pid))]


def _outputs(pid: int) -> Iterable[str]:
    for descriptor in (1, 2):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue


def programs_with(folder: str | os.PathLike[str]) -> list[int]:
    """The processes of our own programs that were started with a file in this folder. It finds some whose environment
    cannot be read: Dragon writes a title over that of its launcher, and of its host where there are few variables."""
    inside = os.path.join(os.fspath(folder), "").encode()
    return [pid for pid in _pids() if _are_in(arguments(pid), b"rhapsody_mcp.engine.", inside)]


def _are_in(arguments: Sequence[bytes], *beginnings: bytes) -> bool:
    """Whether there is one with each of these beginnings; what was written anew has blanks between them."""
    words = [word for argument in arguments for word in argument.split(b" ")]
    return all(any(word.startswith(beginning) for word in words) for beginning in beginnings)


def relatives(pids: Iterable[int], sessions: set[int]) -> set[int]:
    """The living among these processes, with all that descend from them or are in a session with one of them. The
    sessions that they are in are added to `sessions`, whose processes are relatives as well."""
    parents = {pid: parent for pid, parent, _ in _living()}
    pids_found = set(pids) & parents.keys()
    while True:
        sessions |= {_session(pid) for pid in pids_found} - {0}
        more = {
            pid for pid, parent in parents.items() if parent in pids_found or _session(pid) in sessions
        } - pids_found
        if not more:
            return pids_found
        pids_found |= more


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def with_arguments(*wanted: str) -> list[int]:
    """The processes whose command line holds these arguments."""
    words = {argument.encode() for argument in wanted}
    return [pid for pid in _pids() if words <= {*arguments(pid)}]


def arguments(pid: int) -> list[bytes]:
    """Its command line; empty where there is no such process."""
    data = _read(pid, "cmdline")
    return data.split(b"\0") if data else []


def started_at(pid: int) -> int:
    """When a process was started, in the kernel's own units since its start; 0 where there is no such process, or
    where the system does not tell. Together with its number it names a process for good."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else 0


def stat_fields(pid: int) -> list[bytes]:
    """What the kernel tells of a process in /proc/PID/stat, from the state (field 3) on; empty where there is no such
    process, or where the system does not tell."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def group(leader: int) -> list[int]:
    """The living processes of this process group."""
    return [pid for pid, _, number in _living() if number == leader]


def living(pids: Iterable[int]) -> set[int]:
    """Those of these processes that have not ended."""
    return set(pids) & {pid for pid, _, _ in _living()}


def groups_of(pids: Iterable[int]) -> set[int]:
    """The process groups that these processes are in."""
    wanted = set(pids)
    return {number for pid, _, number in _living() if pid in wanted}


def end(find: Callable[[], Iterable[int]], grace_s: float = 0.0, within_s: float = 5.0, collects: bool = True) -> None:
    """End the processes that `find` names, again and again until it names none: TERM first where there is a
    grace, then KILL. Gives up after `within_s` more seconds (a process in the kernel's hands cannot be killed).
    This process's children that end meanwhile are collected, unless it wants to know their exit codes."""
    deadline = time.monotonic() + grace_s
    if grace_s:
        send_signal(find(), signal.SIGTERM)
        while time.monotonic() < deadline and any(True for _ in find()):
            if collects:
                reap()
            time.sleep(0.01)
    while time.monotonic() < deadline + within_s:
        alive = [pid for pid in find() if pid != os.getpid()]
        if not alive:
            return
        send_signal(alive, signal.SIGKILL)
        if collects:
            reap()
        time.sleep(0.005)


def outlives(pid: int, lifeline: int, outputs: Iterable[Output] = ()) -> bool:
    """Wait for this process's child to end, or for end-of-file on the lifeline; True where the child ends first.

    The child is not collected; other children that end meanwhile, such as adopted ones, are. What the child prints is
    kept meanwhile. Call it from the main thread.
    """
    signal.signal(signal.SIGCHLD, lambda *_: _collect_others(pid))
    _collect_others(pid)
    child = os.pidfd_open(pid) if sys.platform == "linux" else -1
    printed = {output.reader: output for output in outputs}
    ends = [lifeline, child] if child >= 0 else [lifeline]
    try:
        while not _has_ended(pid):
            readable, _, _ = select.select([*ends, *printed], [], [], None if child >= 0 else _POLL_S)
            if lifeline in readable and not os.read(lifeline, 4096):
                return False
            for reader in printed.keys() & readable:
                if not printed[reader].drain():
                    del printed[reader]
    except OSError:  # the lifeline was closed
        return False
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if child >= 0:
            os.close(child)
    return True


def _collect_others(pid: int) -> None:
    """Collect the children that have ended, but this one."""
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != pid:
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:
        return


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
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def send_signal(pids: Iterable[int], number: int) -> None:
    """To those of these processes that are there and this user's."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []


def _living() -> Iterable[tuple[int, int, int]]:
    """Each living process with its parent and its process group; zombies are left out."""
    if not os.path.isdir("/proc"):
        yield from _living_by_ps()
    for pid in _pids():
        fields = _read(pid, "stat").rpartition(b")")[2].split(None, 3)
        if fields and fields[0] not in (b"Z", b"X"):
            yield pid, int(fields[1]), int(fields[2])


def _living_by_ps() -> Iterable[tuple[int, int, int]]:
    import subprocess

    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, parent, number, state = line.split()
        if not state.startswith("Z"):
            yield int(pid), int(parent), int(number)
