"""Prints the README's table of tools: what each is for, and what it costs a model to know it.

    python -m tests.contract.count_tokens

Counted is the compact JSON of each tool as it goes over the wire, with Mistral's public Tekken tokenizer, which
comes with vLLM.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from rhapsody_mcp.cards import Card, read_cards

__all__ = ["count_tokens", "table", "tokens_of"]

_SNAPSHOTS = Path(__file__).parent / "snapshots"


@cache
def _tokenizer() -> Any:
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    data = Path(mistral_common.__file__).parent / "data"
    return Tekkenizer.from_file(str(data / "tekken_240911.json"))


def count_tokens(tool: str) -> int:
    """Of a tool as its snapshot has it."""
    wire = json.loads((_SNAPSHOTS / f"{tool}.json").read_text(encoding="utf-8"))
    return tokens_of(json.dumps(wire, separators=(",", ":"), ensure_ascii=False))


def tokens_of(text: str) -> int:
    """What it costs a model to read it."""
    return len(_tokenizer().encode(text, bos=False, eos=False))


def table() -> str:
    """In Markdown, a line a tool."""
    cards = sorted(read_cards(), key=lambda card: (_ORDER.index(card.toolset), card.name))
    rows = [f"| `{card.name}` | {_one_line(card)} | {count_tokens(card.name)} |" for card in cards]
    total = f"| all twelve | | {sum(count_tokens(card.name) for card in cards)} |"
    return "\n".join(["| tool | what it is for | tokens |", "|---|---|---|", *rows, total])


_ORDER = ("sessions", "tasks", "functions", "insight")


def _one_line(card: Card) -> str:
    """How the card begins."""
    return re.split(r"[.;]\s", card.text)[0].rstrip(".") + "."


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
