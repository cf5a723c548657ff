"""What is shown of tables, arrays and tensors."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.engine.task.function_call import encode
from rhapsody_mcp.engine.views.inspection import view

MADE = """
numpy.zeros((5000, 5000), dtype="float32") | numpy.ndarray of shape (5000, 5000), dtype float32 | [0.0, 0.0
numpy.arange(3) | numpy.ndarray of shape (3,), dtype int64 | 0, 1, 2
numpy.float64(2.5) | | 2.5
pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}) | pandas.DataFrame of 2 rows x 2 columns | [1, 'x'], [2, 'y']
pandas.DataFrame({"a": [1]}, index=["k"]) | pandas.DataFrame of 1 row x 1 column | ['k', 1]
pandas.DataFrame([[1, 2]], columns=["a", "a"]) | pandas.DataFrame of 1 row x 2 columns | [1, 2]
pandas.DataFrame({"a": []}) | pandas.DataFrame of 0 rows x 1 column | []
pandas.DataFrame({"t": pandas.date_range("2020-01-01", periods=1)}) | pandas.DataFrame | ['2020-01-01 00:00:00']
pandas.Series([1.5, float("nan")]) | pandas.Series of shape (2,), dtype float64 | 1.5, 'NaN'
pandas.Series([7], index=["k"], name="v") | pandas.Series of 1 row | ['k', 7]
[pandas.DataFrame({"a": [1]})] | | ['pandas.DataFrame of 1 row x 1 column']
polars.DataFrame({"a": [1, None]}) | polars.DataFrame of 2 rows x 1 column | [1], [None]
polars.Series("v", [3]) | polars.Series of 1 row | [3]
torch.zeros(2, 3) | torch.Tensor of shape (2, 3), dtype torch.float32 | [0.0, 0.0, 0.0]
"""


@pytest.mark.parametrize("line", MADE.strip().splitlines())
def test_it_is_shown_by_rows_below_what_it_is(line: str, tmp_path: Path) -> None:
    code, about, shown = (part.strip() for part in line.split("|"))
    library = next(name for name in ("numpy", "pandas", "polars", "torch") if f"{name}." in code)
    made: Any = eval(code, {library: pytest.importorskip(library)})
    value = encode(made, str(tmp_path))
    seen = view(value, "", None, None, 2000)["view"]
    assert shown in str(seen["plain"]) and seen["about"] == value.about
    assert value.about.startswith(about) and bool(about) == bool(value.about)


def test_pages_are_of_rows_and_columns_have_their_types(tmp_path: Path) -> None:
    pandas: Any = import_module("pandas")
    frame = pandas.DataFrame({"n": range(1000), "half": [n / 2 for n in range(1000)]}, index=range(5, 1005))
    seen = view(encode(frame, str(tmp_path)), "", -2, 1, 2000)["view"]
    assert (seen["plain"], seen["start"], seen["total"]) == ([[1003, 998, 499.0]], 998, 1000)
    assert seen["columns"] == ["index int64", "n int64", "half float64"]
    wide = view(encode(pandas.DataFrame([range(200)]), str(tmp_path)), "", None, None, 2000)["view"]
    assert wide["columns"][-1] == "... and 150 more" and len(wide["plain"][0]) == 50
