"""Each row of the fault matrix."""

from __future__ import annotations

import pytest

from tests.faults.rows import ROWS, Row
from tests.faults.run_row import run_row

pytestmark = pytest.mark.anyio


def _marked(row: Row) -> object:
    return pytest.param(row, id=row.name, marks=[pytest.mark.ci] if row.in_ci else [])


@pytest.mark.parametrize("row", [_marked(row) for row in ROWS])
async def test_nothing_is_lost_doubled_or_left(row: Row, request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("noticed_s", await run_row(row)))
