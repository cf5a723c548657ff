"""The file of a ledger: opens it safely, writes transactions into it, and says in words what goes wrong."""

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
from rhapsody_mcp.ledger.sql import run_all
from rhapsody_mcp.model.errors import LedgerDamaged, LedgerError, LedgerTooNew, LedgerUnavailable

__all__ = ["LEDGER", "Journal", "Store", "journal_for"]

Journal = Literal["WAL", "TRUNCATE"]

LEDGER = "ledger.sqlite"
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
_CANNOT_LOOK = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}


class Store:
    """For one thread at a time, in the process that holds the lock of the folder.

    A transaction that `commit` returned from survives the end of the process, however it ends, and a power cut, where
    the disk keeps what fsync promises. That costs an fsync for each (0.2 ms on a local disk); without, a power cut
    would take back what agents had been told of in the last seconds.
    """

    def __init__(self, folder: Path, steps: Steps, journal: Journal | None = None) -> None:
        self.path = folder / LEDGER
        self._steps, self._journal = steps, journal
        self._options = ""
        self._connection: sqlite3.Connection
        self._file: tuple[int, int]

    def open(self, locks: bool = True) -> None:
        """Without `locks` none are asked of a file system that knows none.

        Raises LedgerTooNew and LedgerDamaged, with nothing changed, and LedgerUnavailable.
        """
        with self._in_words():
            self._options = "" if locks else "&nolock=1"
            known_good = self._inspect()
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._connection = self._connect("mode=rw")
            try:
                self._prepare(known_good)
            except BaseException:
                self._connection.close()
                raise

    def _inspect(self) -> bool:
        """Whether it could be looked at without a change to it, and is good. What a crash left beside it is looked at
        too, for which there must be room on the disk, and may have to be undone first."""
        if not self.path.exists() or not self.path.stat().st_size:
            return True
        mode = "mode=ro" if self._is_left_open() else "mode=ro&immutable=1"
        try:
            with closing(self._connect(mode)) as connection:
                self._examine(connection)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in _CANNOT_LOOK:
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
        found: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(found.splitlines()[-1])
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
        self.path.with_name(f"{self.path.name}-shm").unlink(missing_ok=True)  # of the look; nobody has it open now
        migrate(connection, self._steps)
        at = os.stat(self.path)
        self._file = at.st_dev, at.st_ino

    def begin(self, changes: Iterable[Change]) -> None:
        """Run them, in a transaction that `commit` or `roll_back` ends.

        Raises LedgerUnavailable and LedgerDamaged, and what a value raises that cannot be written at all; then
        nothing of them is there.
        """
        with self._in_words(), self._undone_where_it_fails():
            self._look_for_file()
            self._connection.execute("BEGIN IMMEDIATE")
            run_all(self._connection, (row for change in changes for row in change.rows()))

    def commit(self) -> None:
        """Raises LedgerUnavailable and LedgerDamaged; then nothing of it is there."""
        with self._in_words(), self._undone_where_it_fails():
            self._connection.execute("COMMIT")

    def roll_back(self) -> None:
        with suppress(sqlite3.Error):
            self._connection.rollback()

    def read(self, sql: str, *fields: str | float | int) -> list[tuple[Any, ...]]:
        """Raises LedgerDamaged and LedgerUnavailable."""
        with self._in_words():
            return self._connection.execute(sql, fields).fetchall()

    def gather(self) -> None:
        """Bring what is in the log into the one file, where there is room for it; the log gives its room back."""
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """With all that was committed in the one file, where there is room for it."""
        self.gather()
        self._connection.close()

    def _look_for_file(self) -> None:
        """What is written into a file that has been deleted or moved away is lost, and no one would say so."""
        try:
            at = os.stat(self.path)
        except FileNotFoundError:
            raise self._unavailable("its file is gone") from None
        if (at.st_dev, at.st_ino) != self._file:
            raise self._unavailable("another file has taken its place")

    @contextmanager
    def _undone_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.roll_back()
            raise

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if (said := self._said(error)) is None:
                raise
            raise said from error
        except OSError as error:
            raise self._unavailable(error.strerror or str(error)) from error

    def _said(self, error: sqlite3.Error) -> LedgerError | None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            return self._damaged(str(error))
        return self._unavailable(f"{_UNAVAILABLE[code]} ({error})") if code in _UNAVAILABLE else None

    def _damaged(self, why: str) -> LedgerDamaged:
        there, away = shlex.quote(str(self.path)), shlex.quote(str(self.path.with_name("damaged")))
        return LedgerDamaged(
            f"the ledger {self.path} is damaged: {why}. Nothing is written into it. To go on without what is in it, "
            f"move it away: mkdir {away} && mv {there}* {away}. What can still be read of it is shown by: sqlite3 "
            f"{there} .recover"
        )

    def _unavailable(self, why: str) -> LedgerUnavailable:
        return LedgerUnavailable(f"the ledger {self.path} cannot be written: {why}.")


def journal_for(folder: Path) -> Journal:
    """For a ledger in this folder: a write-ahead log needs what network file systems do not promise."""
    return "TRUNCATE" if is_network(file_system(folder)) else "WAL"
