"""Reads the texts for agents: the cards in tools/ and the prompts in prompts/."""

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
    "toolset_names",
]

_FENCE = "---\n"
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_INSTRUCTIONS = "instructions.md"
_NO_PLACEHOLDERS = {"item"}
"""Names in braces that `for_each` replaces, and that a prompt leaves as they are."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Annotations(_Frozen):
    """MCP's tool annotations."""

    read_only: bool
    destructive: bool
    idempotent: bool
    open_world: bool


class Example(_Frozen):
    """A working call of the tool, provided that the tasks that it names exist."""

    says: str
    arguments: dict[str, Any]


class Card(_Frozen):
    """The card of a tool. `text` is the description that the model gets; `examples` are for readers and tests."""

    toolset: str
    name: str
    title: str
    annotations: Annotations
    examples: tuple[Example, ...]
    text: str


class Argument(_Frozen):
    """An argument of a prompt. An optional argument has a default text."""

    name: str
    description: str
    default: str | None = None

    @property
    def required(self) -> bool:
        return self.default is None


class PromptText(_Frozen):
    """An MCP prompt. Each argument has a placeholder in the text, as in `{session}`.

    The prompt is offered only together with the tools that it `needs`; other tools that it names may be missing.
    """

    name: str
    title: str
    description: str
    needs: tuple[str, ...]
    arguments: tuple[Argument, ...]
    text: str

    @model_validator(mode="after")
    def _check_placeholders(self) -> Self:
        placeholders = set(_PLACEHOLDER.findall(self.text)) - _NO_PLACEHOLDERS
        if stray := placeholders ^ {argument.name for argument in self.arguments}:
            raise ValueError(f"{{{min(stray)}}} is not both an argument and a place in the text")
        return self

    def filled(self, values: Mapping[str, str]) -> str:
        """The text with the values, or else the defaults, in place of the placeholders."""
        texts = {argument.name: values.get(argument.name) or argument.default or "" for argument in self.arguments}
        return _PLACEHOLDER.sub(lambda match: texts.get(match.group(1), match.group()), self.text)


def toolset_names() -> list[str]:
    """The names of the toolsets: the folders of tools/."""
    return [folder.name for folder in _folders(_shipped("tools"))]


def read_cards() -> list[Card]:
    """All cards, by toolset and name. Raises RhapsodyError for a malformed card."""
    return [_read_card(toolset.name, file) for toolset in _folders(_shipped("tools")) for file in _texts(toolset)]


def read_prompt(name: str) -> str:
    """The text of prompts/NAME.md."""
    return (_shipped("prompts") / f"{name}.md").read_text(encoding="utf-8").strip()


def read_prompts(folder: Traversable | None = None) -> list[PromptText]:
    """All MCP prompts in the folder, by name; the default folder is this package's. Raises RhapsodyError for a
    malformed prompt."""
    files = _texts(folder or _shipped("prompts"))
    return [_read_prompt_text(file) for file in files if file.name != _INSTRUCTIONS]


def _shipped(name: str) -> Traversable:
    """The folder in the installed package, or beside the package in a checkout."""
    inside = files("rhapsody_mcp") / "_text" / name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def _folders(folder: Traversable) -> list[Traversable]:
    return sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.name)


def _texts(folder: Traversable) -> Iterator[Traversable]:
    yield from sorted((file for file in folder.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)


def _read_card(toolset: str, file: Traversable) -> Card:
    with _errors_of(f"the card tools/{toolset}/{file.name}"):
        fields, text = _front_matter(file)
        return Card(toolset=toolset, name=_stem(file), text=text, **fields)


def _read_prompt_text(file: Traversable) -> PromptText:
    with _errors_of(f"the prompt prompts/{file.name}"):
        fields, text = _front_matter(file)
        return PromptText(name=_stem(file), text=text, **fields)


def _front_matter(file: Traversable) -> tuple[dict[str, Any], str]:
    """The fields of the front matter, and the text after it."""
    head, fence, body = file.read_text(encoding="utf-8").removeprefix(_FENCE).partition(_FENCE)
    if not fence:
        raise ValueError(f"it does not start with front matter between two lines of {_FENCE.strip()}")
    return yaml.safe_load(head), body.strip()


def _stem(file: Traversable) -> str:
    return file.name.removesuffix(".md")


@contextmanager
def _errors_of(text: str) -> Iterator[None]:
    try:
        yield
    except (ValidationError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RhapsodyError(f"{text} is malformed: {error}") from error
