"""Chooses which tools a server offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rhapsody_mcp.cards import Card, PromptText
from rhapsody_mcp.model.errors import UnknownName
from rhapsody_mcp.settings import Settings

__all__ = ["Offer", "choose"]


@dataclass(frozen=True)
class Offer:
    """The names of the tools that are offered, and of those that are not."""

    names: tuple[str, ...]
    withheld: tuple[str, ...]

    def instructions(self, text: str) -> str:
        """`text`, and in it what of it does not hold here."""
        if not self.withheld:
            return text
        return f"{text}\n\nThis server offers only {_listed(self.names)}. It does not offer {_listed(self.withheld)}."

    def prompts(self, prompts: Sequence[PromptText]) -> list[PromptText]:
        """Those that make sense here."""
        useful = [prompt for prompt in prompts if not set(prompt.needs) & set(self.withheld)]
        return [prompt.model_copy(update={"text": self.instructions(prompt.text)}) for prompt in useful]


def choose(cards: Sequence[Card], settings: Settings) -> Offer:
    """What the settings leave of the tools. Raises UnknownName for a toolset that there is not."""
    known = {card.toolset for card in cards}
    for toolset in settings.toolsets or ():
        if toolset not in known:
            raise UnknownName("toolset", toolset, known)
    names = [card.name for card in cards if _is_offered(card, settings)]
    return Offer(tuple(names), tuple(card.name for card in cards if card.name not in names))


def _is_offered(card: Card, settings: Settings) -> bool:
    wanted = settings.toolsets is None or card.toolset in settings.toolsets
    return wanted and (card.annotations.read_only or not settings.read_only)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no tool"
