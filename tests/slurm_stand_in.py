"""Commands that answer in the place of Slurm's, for tests without a cluster."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

import pytest

__all__ = ["SlurmStandIn"]

PARTITIONS = """\
gpu*|up|idle|4|64|256000|2:00:00|1-4|gpu:4
gpu*|up|alloc|2|64|256000|2:00:00|1-4|gpu:4
cpu|up|idle|10|128|512000|infinite|1-infinite|(null)
"""
"""As `PARTITION_FORMAT` of `schedulers/slurm_output.py` says."""


class SlurmStandIn:
    """A scheduler with the partitions gpu (6 nodes, 2 hours and 4 nodes a job) and cpu (10 nodes), which takes every
    job. It is on PATH until the end of the test."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "slurm"
        self.folder.mkdir()
        patch.setenv("PATH", f"{self.folder}{os.pathsep}{os.environ['PATH']}")
        for name in [name for name in os.environ if name.startswith(("SLURM_", "PBS_"))]:
            patch.delenv(name)
        self.starts_at = time.time() + 720
        self.answer("sinfo", PARTITIONS)
        self.answer("squeue")
        self.accept()

    def answer(self, command: str, stdout: str = "", stderr: str = "", exit_code: int = 0) -> None:
        """What the command says from now on."""
        lines = [f"printf %s {shlex.quote(stdout)}", f"printf %s {shlex.quote(stderr)} >&2", f"exit {exit_code}"]
        self._write(command, lines)

    def accept(self) -> None:
        words = f"sbatch: Job 7 to start at {self.starts_at:.0f} using 128 processors on nodes n[1-2] in partition gpu"
        version = '[ "$1" != --version ] || { echo slurm 23.11.4; exit 0; }'
        self._write("sbatch", [version, f"echo {shlex.quote(words)} >&2"])

    def refuse(self, words: str) -> None:
        self.answer("sbatch", stderr=f"sbatch: error: {words}\nallocation failure: {words}\n", exit_code=1)

    def hang(self, command: str) -> None:
        """The command gives no answer for longer than any test lasts."""
        self._write(command, ["exec sleep 3600"])

    def _write(self, command: str, lines: list[str]) -> None:
        file = self.folder / command
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
