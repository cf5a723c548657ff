"""Executes the ledger's SQL statements, many rows of one kind in few statements."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import msgspec

__all__ = ["ENDS", "STARTS", "TASKS", "Field", "Statement", "execute_all"]

Field: TypeAlias = str | bytes | float | int | None

_MAX_CHUNK_ROWS = 100
"""Each step of SQLite releases the interpreter's lock, and a busy event loop keeps the lock for 5 ms: a hundred rows in
one step cost one such wait, not a hundred."""


class Statement(msgspec.Struct, frozen=True):
    """SQL with a placeholder for each value. In a `bulk` statement `{rows}` stands for any number of rows.

    The bulk statements are TASKS, STARTS and ENDS. Their execution in this order has the same effect as in the order of
    the changes: each has a table of its own, and starts and ends, which need their tasks, come after the tasks.
    """

    sql: str
    bulk: bool = False


_OF_EXISTING_TASKS = "(VALUES {rows}) WHERE EXISTS (SELECT 1 FROM tasks WHERE session = column1 AND uid = column2)"

TASKS = Statement(
    "INSERT INTO tasks VALUES {rows} ON CONFLICT (session, uid) DO UPDATE SET number = excluded.number, "
    "parent = excluded.parent, recipe = excluded.recipe, state = excluded.state, submitted = excluded.submitted, "
    "retries = excluded.retries, client = excluded.client",
    bulk=True,
)
STARTS = Statement(
    f"INSERT INTO starts SELECT column1, column2, column3, column4, column5 FROM {_OF_EXISTING_TASKS} "
    "ON CONFLICT (session, uid) DO UPDATE SET started = excluded.started, attempts = excluded.attempts, "
    "last_failure = coalesce(excluded.last_failure, last_failure)",
    bulk=True,
)
ENDS = Statement(
    f"INSERT OR IGNORE INTO ends SELECT column1, column2, column3, column4, column5 FROM {_OF_EXISTING_TASKS}",
    bulk=True,
)


def execute_all(connection: sqlite3.Connection, rows: Iterable[tuple[Statement, tuple[Field, ...]]]) -> None:
    """Execute the statements with their values; the effect is that of one by one in their order."""
    bulk_rows: dict[Statement, list[tuple[Field, ...]]] = {TASKS: [], STARTS: [], ENDS: []}
    for statement, fields in rows:
        if statement.bulk:
            bulk_rows[statement].append(fields)
        else:
            _execute_bulk(connection, bulk_rows)
            connection.execute(statement.sql, fields)
    _execute_bulk(connection, bulk_rows)


def _execute_bulk(connection: sqlite3.Connection, bulk_rows: dict[Statement, list[tuple[Field, ...]]]) -> None:
    for statement, rows in bulk_rows.items():
        for chunk in _chunks(rows, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)):
            row = f"({', '.join('?' * len(chunk[0]))})"
            values = [field for fields in chunk for field in fields]
            connection.execute(statement.sql.replace("{rows}", ", ".join([row] * len(chunk))), values)
        rows.clear()


def _chunks(rows: list[tuple[Field, ...]], max_values: int) -> Iterator[list[tuple[Field, ...]]]:
    chunk_rows = min(_MAX_CHUNK_ROWS, max_values // len(rows[0])) if rows else 1
    return (rows[first : first + chunk_rows] for first in range(0, len(rows), chunk_rows))
