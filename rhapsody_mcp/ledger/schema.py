"""The tables of a ledger, and the migrations between their versions."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["STEPS", "Steps", "migrate", "version_of"]

Steps: TypeAlias = Sequence[Sequence[str]]

STEPS: Steps = (
    (
        """CREATE TABLE sessions (id TEXT PRIMARY KEY, created REAL NOT NULL, used REAL NOT NULL,
            wanted BLOB NOT NULL, client TEXT NOT NULL, folder TEXT NOT NULL, closing INTEGER NOT NULL)""",
        """CREATE TABLE tasks (session TEXT NOT NULL, uid TEXT NOT NULL, number INTEGER NOT NULL, parent TEXT,
            recipe BLOB NOT NULL, state TEXT NOT NULL, submitted REAL NOT NULL, retries INTEGER NOT NULL,
            client TEXT NOT NULL, PRIMARY KEY (session, uid))""",
        "CREATE INDEX tasks_in_order ON tasks (session, number)",
        """CREATE TABLE starts (session TEXT NOT NULL, uid TEXT NOT NULL, started REAL, attempts INTEGER NOT NULL,
            last_failure TEXT, PRIMARY KEY (session, uid)) WITHOUT ROWID""",
        """CREATE TABLE ends (session TEXT NOT NULL, uid TEXT NOT NULL, position INTEGER NOT NULL,
            state TEXT NOT NULL, outcome BLOB NOT NULL, PRIMARY KEY (session, uid))""",
        """CREATE TABLE functions (session TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL,
            source TEXT NOT NULL, entry TEXT NOT NULL, signature TEXT NOT NULL, docstring TEXT NOT NULL,
            PRIMARY KEY (session, number)) WITHOUT ROWID""",
        """CREATE TABLE submissions (session TEXT NOT NULL, key TEXT NOT NULL, asked BLOB NOT NULL,
            uids TEXT NOT NULL, at REAL NOT NULL, client TEXT NOT NULL, PRIMARY KEY (session, key))""",
        "CREATE TABLE handles (task_id TEXT PRIMARY KEY, data BLOB NOT NULL, expires REAL NOT NULL)",
        """CREATE TABLE engines (mark TEXT PRIMARY KEY, kind TEXT NOT NULL, session TEXT NOT NULL,
            pid INTEGER NOT NULL, started INTEGER NOT NULL, folder TEXT NOT NULL)""",
        "CREATE TABLE numbers (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    ),
)
"""Step N makes version N + 1 of version N; step 0 starts from an empty file. Existing files were made with these
steps, so that steps are only ever added."""


def version_of(connection: sqlite3.Connection) -> int:
    """The version of the tables; 0 for an empty file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, steps: Steps) -> None:
    """Bring the tables to the newest version, in one transaction."""
    version = version_of(connection)
    if version == len(steps):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(steps)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise
