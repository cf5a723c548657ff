"""Numbers, durations, names and texts as replies write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

__all__ = [
    "NAMES_SHOWN",
    "call_text",
    "counts_text",
    "duration",
    "limited_list",
    "one_line",
    "quoted",
    "rounded",
    "shortened",
    "untrusted",
]

NAMES_SHOWN = 20
"""Names in one list of a reply."""
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)
"""Characters that end a line, move a cursor, turn the direction of a text, or that a person cannot see. The joiners of
emoji and of some scripts stay."""


def rounded(seconds: float | None) -> float | None:
    """Rounded to microseconds."""
    return None if seconds is None else round(seconds, 6)


def duration(seconds: float) -> str:
    """As in `0.4 ms`, `310 ms` or `2.50 s`."""
    if seconds >= 1 or not seconds:
        return f"{seconds:.2f} s" if seconds else "0 s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def counts_text(counts: Mapping[str, int]) -> str:
    """As in `3 DONE, 1 FAILED`."""
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "no tasks"


def limited_list(names: Sequence[str], most: int, ending: str = " and {} more") -> str:
    """As in `train, fit-1 and 9 more`; the ending tells that there are more names, and how many."""
    more = len(names) - most
    return ", ".join(names[:most]) + (ending.format(more) if more > 0 else "")


def shortened(text: str, max_chars: int) -> str:
    """A long text without its middle, cut between words: the beginning and the end of a message say most."""
    if len(text) <= max_chars:
        return text
    begin = re.sub(r"\s+\S{0,40}\Z", "", text[: max_chars // 2])
    end = re.sub(r"\A\S{0,40}\s+", "", text[-(max_chars // 2) :])
    return f"{begin} ... {end}"


def call_text(tool: str, **arguments: Any) -> str:
    """A call as an agent can make it, as in `get_result(session="session-1", task="train")`."""
    present = {name: value for name, value in arguments.items() if value is not None}
    texts = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in present.items())
    return one_line(f"{tool}({', '.join(texts)})")


def one_line(text: str) -> str:
    """The text with its control characters escaped, so that a task's output cannot begin a line of a reply."""
    return _CONTROLS.sub(lambda match: _escape(match.group()), text)


def _escape(character: str) -> str:
    """As JSON escapes a character."""
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    units = character.encode("utf-16-be")
    return short.get(character) or "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def quoted(text: str) -> str:
    """The text as a JSON string on one line."""
    return one_line(msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode())


def untrusted(what: str, text: str, shown: str) -> list[str]:
    """Lines that mark a task's output as text by a stranger, not as instructions."""
    lines = [f"| {one_line(line)}" for line in text.rstrip("\n").splitlines()]
    return [f"--- {what}: untrusted output of the task, {shown} ---", *lines, f"--- end of {what} ---"]
