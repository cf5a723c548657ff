"""What a service under test is put on, so that it can be broken: disks, a limit of processes, a clock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.clock import Clock
from tests.faults.disks import CannotMake, Disk
from tests.faults.world import World
from tests.ledgers import MKFS

__all__ = [
    "a_clock",
    "a_disk_that_fails",
    "a_limit_of_processes",
    "a_small_disk",
    "a_small_temporary_folder",
    "nothing_special",
]

_SMALL = "24m"
_PIDS = Path("/sys/fs/cgroup/pids")


@contextmanager
def nothing_special(world: World) -> Iterator[None]:
    yield


@contextmanager
def a_small_disk(world: World) -> Iterator[None]:
    """A tmpfs, which can be filled, and be made read-only while nobody writes to it."""
    world.state.mkdir(mode=0o700)
    world.disk = Disk(world.state)
    world.disk.mount("-t", "tmpfs", "-o", f"size={_SMALL},mode=0700", "tmpfs")
    try:
        yield
    finally:
        world.disk.unmount()


@contextmanager
def a_small_temporary_folder(world: World) -> Iterator[None]:
    """A tmpfs, in which engines keep what tasks print while they run."""
    world.disk = Disk(world.folder / "tmp")
    world.disk.mount("-t", "tmpfs", "-o", f"size={_SMALL},mode=0700", "tmpfs")
    try:
        yield
    finally:
        world.disk.unmount()


@contextmanager
def a_disk_that_fails(world: World) -> Iterator[None]:
    """An ext4 file system in a file, which turns read-only under those who write to it, as after an error of a real
    disk, and can be written to again once it was mounted anew."""
    world.state.mkdir(mode=0o700)
    world.disk = Disk(world.state)
    image = world.folder / "disk"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    made = subprocess.run([MKFS, "-q", str(image)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise CannotMake(f"mkfs.ext4: {made.stderr.strip()}")
    world.disk.mount("-o", "loop", str(image))
    try:
        yield
    finally:
        world.disk.unmount()


@contextmanager
def a_limit_of_processes(world: World) -> Iterator[None]:
    """A pids cgroup of its own for all that is started in this world, without a limit until one is set."""
    group = _PIDS / f"rhapsody-faults-{world.folder.name}"
    try:
        group.mkdir()
    except OSError as error:
        raise CannotMake(f"no pids cgroup can be made: {error}") from error
    world.group = group
    world.prefix = ["/bin/sh", "-c", f'echo 0 > {group}/cgroup.procs; exec "$@"', "sh"]
    try:
        yield
    finally:
        group.rmdir()


@contextmanager
def a_clock(world: World) -> Iterator[None]:
    """The service is started by a program that gives it a clock of its own, which goes right until it is set."""
    world.clock = Clock(world.folder / "clock")
    world.starter = [sys.executable, str(Path(__file__).with_name("clock.py")), str(world.clock.file)]
    yield
