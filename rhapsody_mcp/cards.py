"""Reads what agents are told: the cards in tools/ and the texts in prompts/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rhapsody_mcp.model.errors import RhapsodyError

__all__ = [
    "Annotations",
    "Argument",
    "Card",
    "Example",
    "PromptText",
    "read_cards",
    "read_prompt",
    "read_prompts",
    "toolsets",
]

_FENCE = "---\n"
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_INSTRUCTIONS = "instructions.md"
_NO_PLACEHOLDERS = {"item"}
"""What `for_each` reads, and so stays as it is."""


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


class Argument(_Frozen):
    """What a person fills in. An argument that may be left out has the text that then takes its place."""

    name: str
    description: str
    default: str | None = None

    @property
    def required(self) -> bool:
        return self.default is None


class PromptText(_Frozen):
    """One MCP prompt. Each argument has its place in the text, as in `{session}`.

    Without the tools that it `needs` it makes no sense; those that it only names may be missing.
    """

    name: str
    title: str
    description: str
    needs: tuple[str, ...]
    arguments: tuple[Argument, ...]
    text: str

    @model_validator(mode="after")
    def _has_a_place_for_each_argument(self) -> Self:
        places = set(_PLACEHOLDER.findall(self.text)) - _NO_PLACEHOLDERS
        if stray := places ^ {argument.name for argument in self.arguments}:
            raise ValueError(f"{{{min(stray)}}} is not both an argument and a place in the text")
        return self

    def filled(self, given: Mapping[str, str]) -> str:
        """The text with what was given, or else the default, in its places."""
        values = {argument.name: given.get(argument.name) or argument.default or "" for argument in self.arguments}
        return _PLACEHOLDER.sub(lambda place: values.get(place.group(1), place.group()), self.text)


def toolsets() -> list[str]:
    """The names of the folders of cards."""
    return [entry.name for entry in _entries(_shipped("tools"))]


def read_cards() -> list[Card]:
    """Every card, by toolset and name. Raises RhapsodyError where a card is malformed."""
    return [_read_card(toolset.name, file) for toolset in _entries(_shipped("tools")) for file in _cards(toolset)]


def read_prompt(name: str) -> str:
    """The text of prompts/NAME.md."""
    return (_shipped("prompts") / f"{name}.md").read_text(encoding="utf-8").strip()


def read_prompts(folder: Traversable | None = None) -> list[PromptText]:
    """Every MCP prompt in the folder, by name; default are those of this package.

    Raises RhapsodyError where one is malformed.
    """
    files = _cards(folder or _shipped("prompts"))
    return [_read_prompt_text(file) for file in files if file.name != _INSTRUCTIONS]


def _shipped(name: str) -> Traversable:
    """The folder inside an installed package, or beside the package in a checkout."""
    inside = files("rhapsody_mcp") / "_text" / name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def _entries(folder: Traversable) -> list[Traversable]:
    return sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.name)


def _cards(toolset: Traversable) -> Iterator[Traversable]:
    yield from sorted((file for file in toolset.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)


def _read_card(toolset: str, file: Traversable) -> Card:
    with _named(f"the card tools/{toolset}/{file.name}"):
        fields, text = _parts(file)
        return Card(toolset=toolset, name=_stem(file), text=text, **fields)


def _read_prompt_text(file: Traversable) -> PromptText:
    with _named(f"the prompt prompts/{file.name}"):
        fields, text = _parts(file)
        return PromptText(name=_stem(file), text=text, **fields)


def _parts(file: Traversable) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    head, fence, body = file.read_text(encoding="utf-8").removeprefix(_FENCE).partition(_FENCE)
    if not fence:
        raise ValueError(f"it does not start with front matter between two lines of {_FENCE.strip()}")
    return yaml.safe_load(head), body.strip()


def _stem(file: Traversable) -> str:
    return file.name.removesuffix(".md")


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (ValidationError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RhapsodyError(f"{what} is malformed: {error}") from error
