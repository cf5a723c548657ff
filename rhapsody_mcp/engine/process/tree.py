"""Finds processes by descent, by an environment variable, or by their files, and ends them.

This module imports little, because the supervisor of every program imports it: `signal` alone takes 3 ms.
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
    "child_ends_first",
    "descendants",
    "end",
    "engine_programs_using",
    "group",
    "groups_of",
    "has_children",
    "living",
    "marked",
    "open_lifeline",
    "own_descendants",
    "processes_with_arguments",
    "processes_writing_into",
    "reap",
    "relatives",
    "send_signal",
    "started_at",
    "stat_fields",
]

ENGINE = "RHAPSODY_ENGINE"
"""Environment variable of every process under a keeper; the value is the keeper's random id, its mark."""
PROCESS_MARK = "RHAPSODY_PLACE"
"""Environment variable of a launched process and its descendants; the value is the engine's mark, a dot, and a number.
"""

LIFELINE = "RHAPSODY_LIFELINE"
"""Environment variable with the path of a FIFO. The keeper is its only writer, so that its readers see end-of-file when
the keeper ends, even if it is killed."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_prctl: list[Callable[..., int]] = []
"""The C function, cached: the lookup takes as long as five system calls."""


def adopt_orphans() -> None:
    """Make this process the parent of each descendant whose parent ends. Only Linux supports this."""
    if sys.platform == "linux":
        if not _prctl:
            import ctypes

            _prctl.append(ctypes.CDLL(None, use_errno=True).prctl)
        _prctl[0](_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def own_descendants() -> list[int]:
    """Return the living descendants of this process; this takes one system call if it has no children."""
    return descendants(os.getpid()) if has_children() else []


def has_children() -> bool:
    """Return whether this process has children, including ended children that were not collected."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants(pid: int, excluded: Container[int] = ()) -> list[int]:
    """Return the living descendants of the process, parents first; `excluded` processes and their descendants are left
    out."""
    children: dict[int, list[int]] = {}
    for child, parent, _ in _living():
        if child not in excluded:
            children.setdefault(parent, []).append(child)
    pids = list(children.get(pid, ()))
    for child in pids:
        pids.extend(children.get(child, ()))
    return pids


def marked(name: str, value: str) -> list[int]:
    """Return the processes that were started with this environment variable: with exactly this value, or with this
    value followed by a dot and more.

    A process that cleared its environment is not found.
    """
    exact = f"{name}={value}".encode()
    pids = []
    for pid in _pids():
        data = _read(pid, "environ")
        if exact in data and any(entry == exact or entry.startswith(exact + b".") for entry in data.split(b"\0")):
            pids.append(pid)
    return pids


def _read(pid: int, name: str) -> bytes:
    """Return the content of /proc/PID/NAME; empty if there is no such process, or if it belongs to another user."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def processes_writing_into(folder: str | os.PathLike[str]) -> list[int]:
    """Return the processes whose stdout or stderr is a file in this folder, even a deleted one. This also finds
    processes that cleared their environment."""
    prefix = os.path.join(os.fspath(folder), "")
    return [pid for pid in _pids() if any(target.startswith(prefix) for target in _outputs(pid))]


def _outputs(pid: int) -> Iterable[str]:
    for descriptor in (1, 2):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue


def engine_programs_using(folder: str | os.PathLike[str]) -> list[int]:
    """Return the processes that run a module of this package with a file of this folder as an argument. This also finds
    processes whose environment is unreadable: Dragon overwrites the environment of its launcher with a title, and that
    of the node agent if it has few variables."""
    prefix = os.path.join(os.fspath(folder), "").encode()
    return [pid for pid in _pids() if _have_beginnings(arguments(pid), b"rhapsody_mcp.engine.", prefix)]


def _have_beginnings(arguments: Sequence[bytes], *beginnings: bytes) -> bool:
    """Return whether each of the beginnings starts an argument. In an overwritten command line, blanks separate the
    arguments."""
    words = [word for argument in arguments for word in argument.split(b" ")]
    return all(any(word.startswith(beginning) for word in words) for beginning in beginnings)


def relatives(pids: Iterable[int], sessions: set[int]) -> set[int]:
    """Return the living processes among `pids`, their descendants, and all processes in the same sessions. The
    processes of `sessions` are included; the sessions that are found are added to `sessions`."""
    parents = {pid: parent for pid, parent, _ in _living()}
    family = set(pids) & parents.keys()
    while True:
        sessions |= {_session(pid) for pid in family} - {0}
        more = {pid for pid, parent in parents.items() if parent in family or _session(pid) in sessions} - family
        if not more:
            return family
        family |= more


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def processes_with_arguments(*wanted: str) -> list[int]:
    """Return the processes whose command line contains all these arguments."""
    words = {argument.encode() for argument in wanted}
    return [pid for pid in _pids() if words <= {*arguments(pid)}]


def arguments(pid: int) -> list[bytes]:
    """Return the command line of a process; empty if there is no such process."""
    data = _read(pid, "cmdline")
    return data.split(b"\0") if data else []


def started_at(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if the process has ended, or on systems without
    /proc. A process id is reused, but the pair of process id and start time is not."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else 0


def stat_fields(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the state (field 3) on; empty if there is no such process, or on systems
    without /proc."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def group(leader: int) -> list[int]:
    """Return the living processes of a process group."""
    return [pid for pid, _, number in _living() if number == leader]


def living(pids: Iterable[int]) -> set[int]:
    """Return the processes that have not ended."""
    return set(pids) & {pid for pid, _, _ in _living()}


def groups_of(pids: Iterable[int]) -> set[int]:
    """Return the process groups of these processes."""
    wanted = set(pids)
    return {number for pid, _, number in _living() if pid in wanted}


def end(
    find: Callable[[], Iterable[int]], grace_s: float = 0.0, within_s: float = 5.0, collect_children: bool = True
) -> None:
    """End the processes that `find` returns, repeatedly until `find` returns none. With a grace period, send TERM
    first, then KILL. Give up `within_s` seconds after the grace period: a process in an uninterruptible system call
    cannot be killed. Ended children of this process are collected, unless `collect_children` is False because the
    caller needs their exit codes."""
    deadline = time.monotonic() + grace_s
    if grace_s:
        send_signal(find(), signal.SIGTERM)
        while time.monotonic() < deadline and any(True for _ in find()):
            if collect_children:
                reap()
            time.sleep(0.01)
    while time.monotonic() < deadline + within_s:
        alive = [pid for pid in find() if pid != os.getpid()]
        if not alive:
            return
        send_signal(alive, signal.SIGKILL)
        if collect_children:
            reap()
        time.sleep(0.005)


def child_ends_first(pid: int, lifeline: int, outputs: Iterable[Output] = ()) -> bool:
    """Wait until the child `pid` of this process ends, or until end-of-file on the lifeline; return True if the child
    ends first.

    The child is not collected; other children that end meanwhile, such as adopted processes, are. Output of the child
    is drained meanwhile. Call this function in the main thread.
    """
    signal.signal(signal.SIGCHLD, lambda *_: _collect_others(pid))
    _collect_others(pid)
    child = os.pidfd_open(pid) if sys.platform == "linux" else -1
    outputs_by_reader = {output.reader: output for output in outputs}
    end_descriptors = [lifeline, child] if child >= 0 else [lifeline]
    try:
        while not _has_ended(pid):
            readable, _, _ = select.select(
                [*end_descriptors, *outputs_by_reader], [], [], None if child >= 0 else _POLL_S
            )
            if lifeline in readable and not os.read(lifeline, 4096):
                return False
            for reader in outputs_by_reader.keys() & readable:
                if not outputs_by_reader[reader].drain():
                    del outputs_by_reader[reader]
    except OSError:  # the lifeline was closed
        return False
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if child >= 0:
            os.close(child)
    return True


def _collect_others(pid: int) -> None:
    """Collect the children that have ended, except this one."""
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != pid:
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:
        return


_POLL_S = 0.2  # for systems without pidfd_open


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def open_lifeline() -> int:
    """Return the reading end of the keeper's lifeline, for a process under the keeper; if the keeper has ended, a
    descriptor at end-of-file."""
    try:
        lifeline = os.open(os.environ[LIFELINE], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.set_blocking(lifeline, True)
    return lifeline


def reap() -> None:
    """Collect the children of this process that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def send_signal(pids: Iterable[int], number: int) -> None:
    """Send a signal to those processes that exist and belong to this user."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []


def _living() -> Iterable[tuple[int, int, int]]:
    """Yield each living process with its parent and its process group; zombies are left out."""
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
