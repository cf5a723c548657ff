"""The processes of a service under test by the part they play, and files that they share memory by."""

from __future__ import annotations

import asyncio
import glob
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tests.processes import dragon_files, family

__all__ = ["command_of", "ended", "everyone", "may_be_of", "memory_of", "part", "shared_memory", "started", "told"]

_PARTS: dict[str, tuple[str, ...]] = {
    "bridge": ("-m", "rhapsody_mcp", "stdio"),
    "service": ("-m", "rhapsody_mcp", "service"),
    "keeper": ("-m", "rhapsody_mcp.engine.keeper"),
    "host": ("-m", "rhapsody_mcp.engine.host"),
    "worker": ("-m", "rhapsody_mcp.engine.worker"),
}
"""What the command line of each part has after the interpreter's name."""


def part(name: str) -> list[int]:
    """The living processes of the service under test that play this part."""
    if name == "launcher":
        return [pid for pid in everyone() if any(word.endswith("/dragon") for word in command_of(pid)[1:2])]
    if name == "vLLM server":
        return [pid for pid in everyone() if any(word.endswith("/vllm_launcher.py") for word in command_of(pid)[1:3])]
    if name == "vLLM engine core":
        return [pid for pid in everyone() if "EngineCore" in " ".join(command_of(pid)[:1])]
    if name == "fork server":
        forked = [pid for pid in everyone() if "rhapsody_mcp.engine.fork_server" in command_of(pid)]
        return [pid for pid in forked if _stat(pid, _PARENT) not in forked]
    words = _PARTS[name]
    return [pid for pid in everyone() if _module(pid)[: len(words)] == words]


def _module(pid: int) -> tuple[str, ...]:
    """What Python was told to run there, from -m on; of Dragon's launcher, which is told it for another, nothing."""
    command = command_of(pid)
    return tuple(command[command.index("-m") :]) if "-m" in command[:3] else ()


def everyone() -> set[int]:
    """The living processes of the service under test, and what descends from them; Dragon's and vLLM's write over the
    environment that the others are known by."""
    children: dict[int, list[int]] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        children.setdefault(_stat(pid, _PARENT), []).append(pid)
    found = list(family())
    for pid in found:
        found += children.get(pid, ())
    return {pid for pid in found if command_of(pid)}


def started(pid: int) -> int:
    """When, as the kernel counts; a pid that is used again has another start. 0 where there is no such process."""
    return _stat(pid, _STARTED)


_PARENT, _STARTED = 1, 19  # counted from after the name


def _stat(pid: int, field: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[field])
    return 0


def command_of(pid: int) -> list[str]:
    """Its words; some programs write them anew, with blanks. Empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    return []


def told(pids: Iterable[int]) -> list[str]:
    """Each with the beginning of its command line, for the message of a failed check."""
    return [f"{pid} {' '.join(command_of(pid))[:160]}" for pid in pids]


async def ended(pid: int) -> None:
    """Returns when that process is gone, also when it was gone before."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def memory_of(pid: int, field: str = "VmRSS") -> int:
    """In bytes; VmHWM is the most that it ever was."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def shared_memory() -> set[str]:
    """The files in /dev/shm, but for those that a process outside the family has in use."""
    files = set(glob.glob("/dev/shm/*"))
    return files - _used_by_strangers(files) if files else files


def may_be_of(file: str, pids: Iterable[int]) -> bool:
    """Dragon's files are named after its launcher, and may be another test's; others are named after nobody."""
    name = Path(file).name
    if not re.match(r"DD|.*\d[DM]$", name):
        return True
    return any(file in dragon_files(pid) for pid in pids)


def _used_by_strangers(files: set[str]) -> set[str]:
    ours = {str(pid) for pid in everyone()}
    used = set()
    for folder in Path("/proc").glob("[0-9]*"):
        if folder.name not in ours:
            used |= {file for file in files if file in _mapped(folder) or _inode(file) in _mapped(folder)}
    return used


def _mapped(process: Path) -> set[str]:
    """Paths and inodes of what it has mapped from /dev/shm."""
    with suppress(OSError):
        lines = [line.split() for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line]
        return {line[4] for line in lines} | {line[5] for line in lines}
    return set()


def _inode(file: str) -> str:
    with suppress(OSError):
        return str(os.stat(file).st_ino)
    return ""
