"""Reads what agents are told: the cards in tools/ and the texts in prompts/."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.abc import Traversable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rhapsody_mcp.model.errors import RhapsodyError

__all__ = ["Annotations", "Card", "Example", "read_cards", "read_prompt"]

_FENCE = "---\n"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Annotations(_Frozen):
    """What a host may assume of a tool without calling it."""

    read_only: bool
    destructive: bool
    idempotent: bool
    open_world: bool


class Example(_Frozen):
    """A call of the tool that works, once the tasks that it names are there."""

    says: str
    arguments: dict[str, Any]


class Card(_Frozen):
    """One tool as the model meets it. `text` is its description; `examples` are for readers and tests."""

    toolset: str
    name: str
    title: str
    annotations: Annotations
    examples: tuple[Example, ...]
    text: str


def read_cards() -> list[Card]:
    """Every card, by toolset and name. Raises RhapsodyError where a card is malformed."""
    return [_read_card(toolset.name, file) for toolset in _entries(_shipped("tools")) for file in _cards(toolset)]


def read_prompt(name: str) -> str:
    """The text of prompts/NAME.md."""
    return (_shipped("prompts") / f"{name}.md").read_text(encoding="utf-8").strip()


def _shipped(name: str) -> Traversable:
    """The folder inside an installed package, or beside the package in a checkout."""
    inside = files("rhapsody_mcp") / "_text" / name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def _entries(folder: Traversable) -> list[Traversable]:
    return sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.name)


def _cards(toolset: Traversable) -> Iterator[Traversable]:
    yield from sorted((file for file in toolset.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)


def _read_card(toolset: str, file: Traversable) -> Card:
    head, fence, body = file.read_text(encoding="utf-8").removeprefix(_FENCE).partition(_FENCE)
    name = file.name.removesuffix(".md")
    try:
        if not fence:
            raise ValueError(f"it does not start with front matter between two lines of {_FENCE.strip()}")
        return Card(toolset=toolset, name=name, text=body.strip(), **yaml.safe_load(head))
    except (ValidationError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RhapsodyError(f"the card tools/{toolset}/{file.name} is malformed: {error}") from error
