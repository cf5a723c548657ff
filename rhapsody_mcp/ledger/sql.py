"""The statements that a ledger runs, and how many rows of one kind become few of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import msgspec

__all__ = ["ENDS", "STARTS", "TASKS", "Field", "Statement", "run_all"]

Field: TypeAlias = str | bytes | float | int | None

_ROWS_AT_ONCE = 100
"""A step of SQLite gives the interpreter's lock away, and a busy event loop gives it back only every 5 ms: a hundred
rows in one step cost one such wait, not a hundred."""


class Statement(msgspec.Struct, frozen=True):
    """SQL with a place for each value; where it is `bulk`, `{rows}` in it stands for any number of rows.

    The bulk ones are tasks, their starts and their ends. Run in this order they give the same as in the order in which
    they came: each has a table of its own, and a start or an end, which counts only where its task is there, comes
    after that.
    """

    sql: str
    bulk: bool = False


_OF_A_TASK = "(VALUES {rows}) WHERE EXISTS (SELECT 1 FROM tasks WHERE session = column1 AND uid = column2)"

TASKS = Statement(
    "INSERT INTO tasks VALUES {rows} ON CONFLICT (session, uid) DO UPDATE SET number = excluded.number, "
    "parent = excluded.parent, recipe = excluded.recipe, state = excluded.state, submitted = excluded.submitted, "
    "retries = excluded.retries, client = excluded.client",
    bulk=True,
)
STARTS = Statement(
    f"INSERT INTO starts SELECT column1, column2, column3, column4, column5 FROM {_OF_A_TASK} "
    "ON CONFLICT (session, uid) DO UPDATE SET started = excluded.started, attempts = excluded.attempts, "
    "last_failure = coalesce(excluded.last_failure, last_failure)",
    bulk=True,
)
ENDS = Statement(
    f"INSERT OR IGNORE INTO ends SELECT column1, column2, column3, column4, column5 FROM {_OF_A_TASK}", bulk=True
)


def run_all(connection: sqlite3.Connection, rows: Iterable[tuple[Statement, tuple[Field, ...]]]) -> None:
    """Run each with its values, so that what is there afterwards is as if they had run one by one."""
    waiting: dict[Statement, list[tuple[Field, ...]]] = {TASKS: [], STARTS: [], ENDS: []}
    for statement, fields in rows:
        if statement.bulk:
            waiting[statement].append(fields)
        else:
            _run_bulk(connection, waiting)
            connection.execute(statement.sql, fields)
    _run_bulk(connection, waiting)


def _run_bulk(connection: sqlite3.Connection, waiting: dict[Statement, list[tuple[Field, ...]]]) -> None:
    for statement, rows in waiting.items():
        for part in _parts(rows, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)):
            row = f"({', '.join('?' * len(part[0]))})"
            values = [field for fields in part for field in fields]
            connection.execute(statement.sql.replace("{rows}", ", ".join([row] * len(part))), values)
        rows.clear()


def _parts(rows: list[tuple[Field, ...]], most_values: int) -> Iterator[list[tuple[Field, ...]]]:
    at_once = min(_ROWS_AT_ONCE, most_values // len(rows[0])) if rows else 1
    return (rows[first : first + at_once] for first in range(0, len(rows), at_once))
