"""Compressed lists, as Slurm writes them: names of nodes, and numbers of cores."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["expand_hostlist", "expand_repeats"]

_NONE = {"", "(null)", "None", "None assigned", "n/a", "N/A"}


def expand_hostlist(text: str) -> tuple[str, ...]:
    """The names in a list such as "node[01-03,7],gpu2" or "rack[1-2]n[1-4]"; none for Slurm's words for "no nodes"."""
    if text.strip() in _NONE:
        return ()
    return tuple(name for part in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text.strip()) for name in _expand(part))


def _expand(pattern: str) -> Iterator[str]:
    """The names of a pattern such as "rack[1-2]n[1-4]"."""
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        yield pattern
        return
    ranges, _, tail = rest.partition("]")
    for number in _numbers(ranges):
        for end in _expand(tail):
            yield f"{head}{number}{end}"


def _numbers(ranges: str) -> Iterator[str]:
    """The numbers of "01-03,7", each with its leading zeros."""
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            yield first
        else:
            yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


def expand_repeats(text: str) -> tuple[int, ...]:
    """The numbers of a list such as "2(x3),4": 2, 2, 2, 4."""
    matches = re.finditer(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(match[1]) for match in matches for _ in range(int(match[2] or 1)))
