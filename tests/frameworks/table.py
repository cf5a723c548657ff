"""The tables of frameworks and of assistants in docs/clients.md."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["Assistant", "Row", "read_assistants", "read_table"]

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


class Assistant(NamedTuple):
    """What the table says of an assistant."""

    version: str
    era: str
    name: str
    reply: str
    pictures: str
    to_know: str


def read_table() -> dict[str, Row]:
    """The rows, by the name of the recipe."""
    lines = [line for line in _DOCUMENT.read_text().splitlines() if "(../tests/frameworks/recipes/" in line]
    return {_recipe(line.split("|")[1]): Row(*_cells(line)) for line in lines}


def read_assistants() -> dict[str, Assistant]:
    """The rows, by the name of the assistant."""
    table = _DOCUMENT.read_text().partition("| assistant |")[2].partition("\n\n")[0]
    lines = table.splitlines()[2:]
    return {line.split("|")[1].strip(): Assistant(*_cells(line)) for line in lines}


def _cells(line: str) -> list[str]:
    """Those after the first."""
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")[1:]]


def _recipe(cell: str) -> str:
    """The name in a link such as `[agno](../tests/frameworks/recipes/agno.py)`."""
    return Path(cell.partition("](")[2].partition(")")[0]).stem
