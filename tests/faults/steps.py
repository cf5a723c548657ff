"""The steps of the pipelines that are broken: what each is asked to do, what it must give, and how it tells that it
ran, in a file that no server has a hand in."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["Step", "Steps", "digest", "value_of"]

LARGE = 8_000
"""Numbers of a result that is a file of more than 64 KB."""

_STEP = """
def step(runs, name, size, gate=None, seconds=0):
    import os, time, zlib
    rank = os.environ.get("RHAPSODY_RANK")
    with open(os.path.join(runs, name if rank is None else f"{name}.{rank}"), "a") as file:
        file.write(f"{os.getpid()} {time.time()}\\n")
    if gate:
        open(gate).close()
    time.sleep(seconds)
    return [zlib.crc32(f"{name}:{number}".encode()) for number in range(size)]
"""
_ITEM = """
def item(runs, name, number):
    import os, time
    with open(os.path.join(runs, f"{name}.{number}"), "a") as file:
        file.write(f"{os.getpid()} {time.time()}\\n")
    return [number, number * number]
"""
_DIGEST = """
def digest(runs, name, *values):
    import hashlib, json, os, time
    with open(os.path.join(runs, name), "a") as file:
        file.write(f"{os.getpid()} {time.time()}\\n")
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
"""
_SHELL = 'echo "$$ $(date +%s.%N)" >> "$1/$2"; if [ -n "$4" ]; then : < "$4"; fi; echo "$3"'


def value_of(name: str, size: int) -> list[int]:
    """What the step of this name gives."""
    return [zlib.crc32(f"{name}:{number}".encode()) for number in range(size)]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    """A task. `files` are those that get one line each time that it runs; a for_each has one for each item.

    `held` ones wait at the gate; `read` ones have a result to compare; others may run or not when something dies, and
    so `may_be_lost`.
    """

    request: dict[str, Any]
    value: Any
    files: tuple[str, ...]
    held: bool = False
    read: bool = True
    may_be_lost: bool = False

    @property
    def name(self) -> str:
        return str(self.request["name"])

    @property
    def retries(self) -> int:
        return int(self.request.get("retries", 0))


class Steps:
    """Makes steps that leave their marks in `runs`. Those that are `held` wait until somebody opens the gate."""

    def __init__(self, runs: Path, gate: Path) -> None:
        self.runs, self.gate = runs, gate

    def native(self, name: str, size: int = 3, held: bool = False, seconds: float = 0, **fields: Any) -> Step:
        args = [str(self.runs), name, size, str(self.gate) if held else None, seconds]
        request = {"name": name, "source": _STEP, "args": args, "retry_delay_s": 0, **fields}
        return Step(request, value_of(name, size), (name,), held)

    def job(self, name: str, ranks: int = 2, held: bool = False, **fields: Any) -> Step:
        files = tuple(f"{name}.{rank}" for rank in range(ranks))
        return replace(self.native(name, held=held, ranks=ranks, **fields), files=files)

    def program(self, name: str, script: str = _SHELL, held: bool = False, **fields: Any) -> Step:
        gate = str(self.gate) if held else ""
        arguments = ["-c", script, "step", str(self.runs), name, f"{name} ran", gate]
        request = {"name": name, "executable": "/bin/sh", "arguments": arguments, **fields}
        return Step(request, f"{name} ran", (name,), held)

    def source(self, name: str, text: str, *args: Any, value: Any, **fields: Any) -> Step:
        """A function that writes its own mark."""
        request = {"name": name, "source": text, "args": [str(self.runs), name, *args], **fields}
        return Step(request, value, (name,))

    def unread(self, name: str, text: str) -> Step:
        """One whose result is for other tasks only."""
        return replace(self.source(name, text, value=None), read=False)

    def items(self, name: str, of: Step) -> Step:
        """A task for each number that `of` gives."""
        request = {
            "name": name,
            "source": _ITEM,
            "args": [str(self.runs), name, {"item": True}],
            "for_each": {"ref": of.name},
        }
        value = [[number, number * number] for number in of.value]
        return Step(request, value, tuple(f"{name}.{number}" for number in of.value))

    def digest(self, name: str, *of: Step, **fields: Any) -> Step:
        """The digest of what these give."""
        args = [str(self.runs), name, *({"ref": step.name} for step in of)]
        value = digest([step.value for step in of])
        return Step({"name": name, "source": _DIGEST, "args": args, **fields}, value, (name,))
