"""Which tools a server offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rhapsody_mcp.cards import Card, PromptText
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.settings import Settings

__all__ = ["ToolSelection", "select_tools"]


@dataclass(frozen=True)
class ToolSelection:
    """The names of the tools that are offered, and of the tools that are withheld."""

    names: tuple[str, ...]
    withheld: tuple[str, ...]

    def instructions(self, text: str) -> str:
        """The text, with a note about the withheld tools, which it may name."""
        if not self.withheld:
            return text
        names, withheld = _names_text(self.names), _names_text(self.withheld)
        return f"{text}\n\nThis server offers only {names}. It does not offer {withheld}."

    def prompts(self, prompts: Sequence[PromptText]) -> list[PromptText]:
        """The prompts that need no withheld tool."""
        useful = [prompt for prompt in prompts if not set(prompt.needs) & set(self.withheld)]
        return [prompt.model_copy(update={"text": self.instructions(prompt.text)}) for prompt in useful]


def select_tools(cards: Sequence[Card], settings: Settings) -> ToolSelection:
    """The tools that the settings allow. Raises UnknownName for an unknown toolset."""
    known = {card.toolset for card in cards}
    for toolset in settings.toolsets or ():
        if toolset not in known:
            raise UnknownName("toolset", toolset, known)
    names = [card.name for card in cards if _is_offered(card, settings)]
    return ToolSelection(tuple(names), tuple(card.name for card in cards if card.name not in names))


def _is_offered(card: Card, settings: Settings) -> bool:
    selected = settings.toolsets is None or card.toolset in settings.toolsets
    return selected and (card.annotations.read_only or not settings.read_only)


def _names_text(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no tool"
