"""Looks at the processes of this machine."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
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
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (folder / "environ").read_bytes()
            if all(word in command for word in words) and mark in environment and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def dragon_files(launcher: int) -> set[str]:
    """The files in /dev/shm that may be of a Dragon runtime with this launcher, whatever user Dragon takes it for."""
    return {*glob(f"/dev/shm/DD*{str(launcher)[-3:]}*"), *glob(f"/dev/shm/*{launcher}[DM]")}


async def wait_until(holds: Callable[[], bool], within_s: float = 600.0) -> None:
    """Look until it holds; another process brings it about, and no event tells of that."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - see the docstring
            await asyncio.sleep(0.01)
