"""Looks at a ledger from outside, also at one that another process holds, without touching it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.ledger.file_system import file_system, is_network
from rhapsody_mcp.ledger.ledger import LOCK
from rhapsody_mcp.ledger.lock import Holder, holder
from rhapsody_mcp.ledger.schema import version_of
from rhapsody_mcp.ledger.store import LEDGER, Journal, journal_for

__all__ = ["Look", "look"]

_MOST_BYTES = 256 * 1024 * 1024
_TRIES = 3  # what is copied while it is written may not fit together


class Look(msgspec.Struct, frozen=True):
    """`bytes` is 0 where there is no ledger yet; `sessions` is None where they could not be counted, and `problem`
    says why. `holder` is the living process that has it open."""

    path: Path
    file_system: str
    network: bool
    journal: Journal
    bytes: int
    sessions: int | None
    problem: str
    holder: Holder | None


def look(folder: Path) -> Look:
    """At the ledger of this folder, which need not be there. Makes nothing, takes no lock and waits for none."""
    path = folder / LEDGER
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    kind = file_system(there)
    size = sum(_size(file) for file in _files(path))
    sessions, problem = _count(path, size) if size else (0, "")
    held = holder(folder / LOCK)
    return Look(
        path=path,
        file_system=kind,
        network=is_network(kind),
        journal=journal_for(there),
        bytes=size,
        sessions=sessions,
        problem=problem,
        holder=held if held is not None and held.alive else None,
    )


def _count(path: Path, size: int) -> tuple[int | None, str]:
    """In a copy: whoever opens the file itself may lock it, or write into it."""
    if size > _MOST_BYTES:
        return None, "it is too large to be looked at by the way"
    problem = ""
    for _ in range(_TRIES):
        try:
            return _count_copy(path), ""
        except (OSError, sqlite3.Error) as error:
            problem = str(error)
    return None, problem


def _count_copy(path: Path) -> int:
    with tempfile.TemporaryDirectory() as place:
        for file in _files(path):
            with suppress(FileNotFoundError):
                shutil.copyfile(file, Path(place, file.name))
        with closing(sqlite3.connect(Path(place, path.name))) as connection:
            if not version_of(connection):
                return 0
            return int(connection.execute("SELECT count(*) FROM sessions WHERE NOT closing").fetchone()[0])


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # by now
        return 0


def _files(path: Path) -> list[Path]:
    """Those of the ledger that are there, the one first that is older where they do not fit together."""
    return [file for ending in ("", "-wal", "-journal") if (file := path.with_name(path.name + ending)).is_file()]
