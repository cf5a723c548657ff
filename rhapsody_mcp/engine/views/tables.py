"""Tables, arrays and tensors among the results of tasks: described, and read by rows.

It runs in a process for user code, and imports no library: a value is one of a library's only where that is loaded.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

__all__ = ["Table", "about_array", "about_table", "as_table", "shape_of"]

_COLUMNS = 50
"""Columns of a table that are shown."""


class Table(NamedTuple):
    """A table of a library: `columns` are its first columns, each with its type, as in `loss float64`."""

    frame: Any
    columns: list[str]
    row_count: int
    has_index: bool = False

    def rows(self, first: int, last: int) -> list[list[Any]]:
        """Return rows as lists of cells."""
        width = _COLUMNS + self.has_index
        if hasattr(self.frame, "iloc"):
            part = self.frame.iloc[first:last, :_COLUMNS]
            return [list(row)[:width] for row in part.itertuples(index=self.has_index, name=None)]
        return [list(row[:_COLUMNS]) for row in self.frame.slice(first, last - first).rows()]


def as_table(value: Any) -> Table | None:
    """Return the table that a value of pandas or Polars is; None for another value, and for a Series that has no index
    of its own, which is read as an array.

    An index that only counts from 0 is left out.
    """
    if (pandas := sys.modules.get("pandas")) is not None:
        if isinstance(value, pandas.Series) and not _counts_from_0(pandas, value.index):
            value = value.to_frame(name="value" if value.name is None else value.name)
        if isinstance(value, pandas.DataFrame):
            return _pandas_table(pandas, value)
    polars = sys.modules.get("polars")
    if polars is not None and isinstance(value, polars.Series):
        value = value.to_frame()
    if polars is not None and isinstance(value, polars.DataFrame):
        columns = [f"{name} {kind}" for name, kind in zip(value.columns, value.dtypes, strict=True)]
        return Table(value, _limited(columns), value.height)
    return None


def _pandas_table(pandas: Any, frame: Any) -> Table:
    columns = _limited([f"{_label(name)} {kind}" for name, kind in zip(frame.columns, frame.dtypes, strict=True)])
    if _counts_from_0(pandas, frame.index):
        return Table(frame, columns, len(frame))
    names = " and ".join(_label(name) for name in frame.index.names if name is not None)
    return Table(frame, [f"{names or 'index'} {frame.index.dtype}", *columns], len(frame), True)


def _counts_from_0(pandas: Any, index: Any) -> bool:
    return isinstance(index, pandas.RangeIndex) and index.start == 0 and index.step == 1 and index.name is None


def _label(name: Any) -> str:
    return "/".join(map(str, name)) if isinstance(name, tuple) else str(name)


def _limited(columns: list[str]) -> list[str]:
    more = len(columns) - _COLUMNS
    return [*columns[:_COLUMNS], f"... and {more} more"] if more > 0 else columns


def about_table(value: Any) -> str:
    """Describe a table, as in `pandas.DataFrame of 1000 rows x 3 columns`; empty for another value."""
    shape = getattr(value, "shape", None)
    if as_table(value) is None or not isinstance(shape, tuple):
        return ""
    rows, *columns = shape
    width = "".join(f" x {count} column{'s' * (count != 1)}" for count in columns)
    return f"{_short_name(value)} of {rows} row{'s' * (rows != 1)}{width}"


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the shape of an array or tensor that has `tolist`; None for other values."""
    if isinstance(value, type) or not callable(getattr(value, "tolist", None)):
        return None
    shape = getattr(value, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else None


def about_array(value: Any) -> str:
    """Describe an array, tensor or Series, as in `numpy.ndarray of shape (5000, 5000), dtype float64`; empty for
    another value, and for a single number."""
    if not (shape := shape_of(value)):
        return ""
    dtype = getattr(value, "dtype", None)
    return f"{_short_name(value)} of shape {shape}{f', dtype {dtype}' if dtype is not None else ''}"


def _short_name(value: Any) -> str:
    """As in `pandas.DataFrame`, whose own module may be `pandas.core.frame`."""
    module = type(value).__module__.partition(".")[0]
    return (
        f"{module}.{type(value).__name__}" if module in sys.modules and module in _LIBRARIES else type(value).__name__
    )


_LIBRARIES = ("numpy", "pandas", "polars", "torch")
