"""Looks at the processes of this machine."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path

__all__ = ["FAMILY", "dragon_files", "family", "wait_until"]


FAMILY = "RHAPSODY_TEST_FAMILY"
os.environ.setdefault(FAMILY, uuid.uuid4().hex)


def family(*words: str) -> list[int]:
    """The living processes whose command line holds all these words, among those that this test process started
    while the variable FAMILY had its present value; they inherit it, whatever their parents are."""
    mark = f"{FAMILY}={os.environ[FAMILY]}".encode()
    return [pid for pid, environment in _processes(words) if mark in environment and pid != os.getpid()]


def _processes(words: tuple[str, ...]) -> Iterator[tuple[int, bytes]]:
    """The ids of the living processes whose command line holds all these words, each with its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (folder / "environ").read_bytes()
            if all(word in command for word in words):
                yield int(folder.name), environment


def dragon_files(launcher: int) -> set[str]:
    """The files in /dev/shm that may be of a Dragon runtime with this launcher, whatever user Dragon takes it for. The
    names contain three digits of the launcher's id: those that may be of another living launcher are left out."""
    others = {pid for pid, _ in _processes(("bin/dragon -s",))} - {launcher}
    return _files_of(launcher).difference(*map(_files_of, others))


def _files_of(launcher: int) -> set[str]:
    return {*glob(f"/dev/shm/DD*{str(launcher)[-3:]}*"), *glob(f"/dev/shm/*{launcher}[DM]")}


async def wait_until(holds: Callable[[], bool], within_s: float = 600.0) -> None:
    """Look until it holds; another process brings it about, and no event tells of that."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - see the docstring
            await asyncio.sleep(0.01)
