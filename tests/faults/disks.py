"""Disks that a test makes, so that it can break them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["CannotMake", "Disk"]


class CannotMake(Exception):
    """The fault could not be made on this machine; the text says why."""


class Disk:
    """Mounted where the service keeps its state."""

    def __init__(self, at: Path) -> None:
        self.at, self._ballast = at, at / "ballast"

    def fill(self) -> None:
        """To the last byte."""
        with self._ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError as error:
                    full = error
        if os.statvfs(self.at).f_bavail:
            raise CannotMake(f"{self.at} is not full after {full}")

    def free(self) -> None:
        self._ballast.unlink()

    def mount(self, *words: str) -> None:
        """Raises CannotMake."""
        done = subprocess.run(["mount", *words, str(self.at)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMake(f"mount {' '.join(words)}: {done.stderr.strip()}")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.at)], capture_output=True, check=True)

    def must_refuse(self) -> None:
        """Raises CannotMake where a file can be made in it all the same."""
        try:
            (self.at / "probe").touch()
        except OSError:
            return
        raise CannotMake(f"{self.at} can be written to")
