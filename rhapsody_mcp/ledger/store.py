"""The SQLite file of a ledger: safe opening, transactions, and SQLite's errors as ledger errors."""

from __future__ import annotations

import os
import shlex
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from rhapsody_mcp.ledger.file_system import file_system, is_network
from rhapsody_mcp.ledger.records import Change
from rhapsody_mcp.ledger.schema import Steps, migrate, version_of
from rhapsody_mcp.ledger.sql import execute_all
from rhapsody_mcp.model.errors import LedgerDamaged, LedgerError, LedgerTooNew, LedgerUnavailable

__all__ = ["LEDGER_FILE", "Journal", "Store", "journal_for"]

Journal = Literal["WAL", "TRUNCATE"]

LEDGER_FILE = "ledger.sqlite"
_BUSY_S = 2.0
_WAL_BYTES = 64 * 1024 * 1024
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_UNAVAILABLE = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_CANTOPEN: "its files cannot be opened",
    sqlite3.SQLITE_PERM: "its files may not be opened",
    sqlite3.SQLITE_BUSY: "another program has it open",
    sqlite3.SQLITE_LOCKED: "another program has it open",
    sqlite3.SQLITE_PROTOCOL: "another program has it open",
    sqlite3.SQLITE_IOERR: "reading or writing it failed",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
}
_CANNOT_INSPECT = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}


class Store:
    """For one thread at a time, in the process that holds the folder's lock.

    After `commit` returns, the transaction survives every end of the process, and a power cut if the disk keeps the
    promise of fsync. Each commit costs an fsync (0.2 ms on a local disk): without it a power cut would take back
    results that agents have seen.
    """

    def __init__(self, folder: Path, steps: Steps, journal: Journal | None = None) -> None:
        self.path = folder / LEDGER_FILE
        self._steps, self._journal = steps, journal
        self._options = ""
        self._connection: sqlite3.Connection
        self._file_id: tuple[int, int]

    def open(self, use_locks: bool = True) -> None:
        """`use_locks` is False on a file system without locks.

        Raises LedgerTooNew and LedgerDamaged, with nothing changed, and LedgerUnavailable.
        """
        with self._ledger_errors():
            self._options = "" if use_locks else "&nolock=1"
            known_good = self._inspect()
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._connection = self._connect("mode=rw")
            try:
                self._prepare(known_good)
            except BaseException:
                self._connection.close()
                raise

    def _inspect(self) -> bool:
        """Whether the file was examined without a change to it, with the log that a crash may have left. False if the
        disk has no room for that, or the log must be rolled back first. Raises LedgerTooNew and LedgerDamaged."""
        if not self.path.exists() or not self.path.stat().st_size:
            return True
        mode = "mode=ro" if self._is_left_open() else "mode=ro&immutable=1"
        try:
            with closing(self._connect(mode)) as connection:
                self._examine(connection)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in _CANNOT_INSPECT:
                return False
            raise
        return True

    def _is_left_open(self) -> bool:
        beside = (self.path.with_name(f"{self.path.name}{ending}") for ending in ("-wal", "-journal"))
        return any(file.exists() and file.stat().st_size for file in beside)

    def _connect(self, options: str) -> sqlite3.Connection:
        name = f"file:{quote(str(self.path))}?{options}{self._options}"
        return sqlite3.connect(name, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)

    def _examine(self, connection: sqlite3.Connection) -> None:
        if (version := version_of(connection)) > len(self._steps):
            raise LedgerTooNew(
                f"the ledger {self.path} was written by a later version of rhapsody-mcp: its tables have version "
                f"{version}, and this one knows {len(self._steps)}. Nothing was changed. Use the later version, or "
                "another folder with --folder."
            )
        finding: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if finding != "ok":
            raise self._damaged(finding.splitlines()[-1])
        if version == 0 and connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
            raise self._damaged("it holds tables of something else")

    def _prepare(self, known_good: bool) -> None:
        connection = self._connection
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # before WAL, which then needs no shared memory
        if not known_good:
            self._examine(connection)
        connection.execute(f"PRAGMA journal_mode = {self._journal or journal_for(self.path.parent)}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
        self.path.with_name(f"{self.path.name}-shm").unlink(missing_ok=True)  # left by the inspection
        migrate(connection, self._steps)
        info = os.stat(self.path)
        self._file_id = info.st_dev, info.st_ino

    def begin(self, changes: Iterable[Change]) -> None:
        """Execute the changes in a transaction that `commit` or `roll_back` ends.

        Raises LedgerUnavailable and LedgerDamaged, and other errors for a value that SQLite does not take. An error
        rolls the transaction back.
        """
        with self._ledger_errors(), self._rolled_back_on_error():
            self._check_file()
            self._connection.execute("BEGIN IMMEDIATE")
            execute_all(self._connection, (row for change in changes for row in change.rows()))

    def commit(self) -> None:
        """Raises LedgerUnavailable and LedgerDamaged, with the transaction rolled back."""
        with self._ledger_errors(), self._rolled_back_on_error():
            self._connection.execute("COMMIT")

    def roll_back(self) -> None:
        with suppress(sqlite3.Error):
            self._connection.rollback()

    def read(self, sql: str, *fields: str | float | int) -> list[tuple[Any, ...]]:
        """Raises LedgerDamaged and LedgerUnavailable."""
        with self._ledger_errors():
            return self._connection.execute(sql, fields).fetchall()

    def checkpoint(self) -> None:
        """Move the write-ahead log into the main file if the disk has room, and truncate the log."""
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Leaves all commits in the main file, if the disk has room."""
        self.checkpoint()
        self._connection.close()

    def _check_file(self) -> None:
        """SQLite would write into a deleted or moved file without an error."""
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            raise self._unavailable("its file is gone") from None
        if (info.st_dev, info.st_ino) != self._file_id:
            raise self._unavailable("another file has taken its place")

    @contextmanager
    def _rolled_back_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.roll_back()
            raise

    @contextmanager
    def _ledger_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if (translated := self._ledger_error(error)) is None:
                raise
            raise translated from error
        except OSError as error:
            raise self._unavailable(error.strerror or str(error)) from error

    def _ledger_error(self, error: sqlite3.Error) -> LedgerError | None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            return self._damaged(str(error))
        return self._unavailable(f"{_UNAVAILABLE[code]} ({error})") if code in _UNAVAILABLE else None

    def _damaged(self, why: str) -> LedgerDamaged:
        path, target = shlex.quote(str(self.path)), shlex.quote(str(self.path.with_name("damaged")))
        return LedgerDamaged(
            f"the ledger {self.path} is damaged: {why}. Nothing is written into it. To go on without what is in it, "
            f"move it away: mkdir {target} && mv {path}* {target}. What can still be read of it is shown by: sqlite3 "
            f"{path} .recover"
        )

    def _unavailable(self, why: str) -> LedgerUnavailable:
        return LedgerUnavailable(f"the ledger {self.path} cannot be written: {why}.")


def journal_for(folder: Path) -> Journal:
    """The journal mode for a ledger in this folder: a write-ahead log does not work on network file systems."""
    return "TRUNCATE" if is_network(file_system(folder)) else "WAL"
