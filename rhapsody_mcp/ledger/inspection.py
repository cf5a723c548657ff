"""Reads facts of a ledger without opening it, even while another process has it open."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.ledger.file_system import file_system, is_network
from rhapsody_mcp.ledger.ledger import LOCK_FILE
from rhapsody_mcp.ledger.lock import LockHolder, read_holder
from rhapsody_mcp.ledger.schema import version_of
from rhapsody_mcp.ledger.store import LEDGER_FILE, Journal, journal_for

__all__ = ["LedgerInfo", "inspect_ledger"]

_MAX_COPY_BYTES = 256 * 1024 * 1024
_ATTEMPTS = 3  # copies of files that are being written may not fit together


class LedgerInfo(msgspec.Struct, frozen=True):
    """`bytes` is 0 where there is no ledger yet. `sessions` counts the open sessions, None where they could not be
    counted; `problem` says why. `holder` is the process that has the ledger open."""

    path: Path
    file_system: str
    network: bool
    journal: Journal
    bytes: int
    sessions: int | None
    problem: str
    holder: LockHolder | None


def inspect_ledger(folder: Path) -> LedgerInfo:
    """The ledger of this folder, which need not exist. Makes no file, takes no lock and waits for none."""
    path = folder / LEDGER_FILE
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    kind = file_system(existing)
    size = sum(_size(file) for file in _files(path))
    sessions, problem = _count_sessions(path, size) if size else (0, "")
    lock_holder = read_holder(folder / LOCK_FILE)
    return LedgerInfo(
        path=path,
        file_system=kind,
        network=is_network(kind),
        journal=journal_for(existing),
        bytes=size,
        sessions=sessions,
        problem=problem,
        holder=lock_holder if lock_holder is not None and lock_holder.alive else None,
    )


def _count_sessions(path: Path, size: int) -> tuple[int | None, str]:
    """Count in a copy: SQLite may lock the original, or write into it."""
    if size > _MAX_COPY_BYTES:
        return None, "it is too large to be looked at by the way"
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            return _count_sessions_in_copy(path), ""
        except (OSError, sqlite3.Error) as error:
            problem = str(error)
    return None, problem


def _count_sessions_in_copy(path: Path) -> int:
    with tempfile.TemporaryDirectory() as copy:
        for file in _files(path):
            with suppress(FileNotFoundError):
                shutil.copyfile(file, Path(copy, file.name))
        with closing(sqlite3.connect(Path(copy, path.name))) as connection:
            if not version_of(connection):
                return 0
            return int(connection.execute("SELECT count(*) FROM sessions WHERE NOT closing").fetchone()[0])


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # removed meanwhile
        return 0


def _files(path: Path) -> list[Path]:
    """The ledger's existing files. The main file is first: in copies of different times it must be the oldest."""
    return [file for ending in ("", "-wal", "-journal") if (file := path.with_name(path.name + ending)).is_file()]
