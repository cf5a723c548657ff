"""The table of frameworks in docs/clients.md."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["Row", "read_table"]

_DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"


class Row(NamedTuple):
    """What the table says of a framework."""

    version: str
    era: str
    name: str
    gives: str
    reply: str
    pictures: str
    to_know: str


def read_table() -> dict[str, Row]:
    """The rows, by the name of the recipe."""
    rows = [
        line.strip("|").split("|") for line in _DOCUMENT.read_text().splitlines() if "(../tests/frameworks/" in line
    ]
    return {_recipe(cells[0]): Row(*(cell.strip().strip("`") for cell in cells[1:])) for cells in rows}


def _recipe(cell: str) -> str:
    """The name in a link such as `[agno](../tests/frameworks/recipes/agno.py)`."""
    return Path(cell.partition("](")[2].partition(")")[0]).stem
