"""Compares a part of a result with what a condition asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_pointer import resolve_pointer

__all__ = ["Comparison", "why_not"]

_SHOWN_CHARS = 80
_VALID = "valid are above and below, alone or together, or equals, or exists"


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a value must be. `exists` is about a value that is there and not null."""

    above: float | None = None
    below: float | None = None
    equals: Any = msgspec.UNSET
    exists: bool | None = None

    def check(self) -> None:
        """Raise InvalidTask for a comparison that makes no sense."""
        bounds = {name: bound for name in ("above", "below") if (bound := getattr(self, name)) is not None}
        for name, bound in bounds.items():
            if not _is_number(bound) or not math.isfinite(bound):
                raise InvalidTask(f"{name} is {_shown(bound)}; valid is a number.", field="when")
        if self.exists is not None and not isinstance(self.exists, bool):
            raise InvalidTask(f"exists is {_shown(self.exists)}; valid is true or false.", field="when")
        given = bool(bounds) + (self.equals is not msgspec.UNSET) + (self.exists is not None)
        if given != 1:
            raise InvalidTask(f"when compares with {'nothing' if not given else 'too much'}; {_VALID}.", field="when")
        if len(bounds) == 2 and bounds["above"] >= bounds["below"]:
            raise InvalidTask(f"no number is above {_shown(self.above)} and below {_shown(self.below)}.", field="when")

    def why_not(self, value: Any, path: str) -> str:
        """As in `is 0.4, not above 0.9`; empty where the part of the value at the JSON Pointer is as asked.

        Raises InvalidTask for a path that is not there, and for a part that is no number where numbers are compared.
        """
        if self.exists is not None:
            return self._why_not_there(value, path)
        part = _scalar(resolve_pointer(value, path))
        if self.equals is not msgspec.UNSET:
            return "" if _same(part, self.equals) else f"is {_shown(part)}, not {_shown(self.equals)}"
        if not _is_number(part):
            raise InvalidTask(f"is {_shown(part)}, and only a number is {self.bounds}", field="when")
        is_inside = (self.above is None or part > self.above) and (self.below is None or part < self.below)
        return "" if is_inside else f"is {_shown(part)}, not {self.bounds}"

    def _why_not_there(self, value: Any, path: str) -> str:
        is_there = False
        with suppress(InvalidTask):
            is_there = resolve_pointer(value, path) is not None
        return "" if is_there is self.exists else "is there" if is_there else "is not there"

    @property
    def bounds(self) -> str:
        """As in `above 0.5 and below 1`."""
        bounds = (("above", self.above), ("below", self.below))
        return " and ".join(f"{name} {_shown(bound)}" for name, bound in bounds if bound is not None)

    def __str__(self) -> str:
        """As in `above 0.9`, `is "good"` or `is there`."""
        if self.exists is not None:
            return "is there" if self.exists else "is not there"
        return self.bounds if self.equals is msgspec.UNSET else f"is {_shown(self.equals)}"


def why_not(value: Any, path: str, comparison: bytes) -> dict[str, str]:
    """In a process for user code: {"why": what `Comparison.why_not` says}, or {"error": ..., "field": ...} for an
    InvalidTask. `comparison` is a Comparison as JSON."""
    try:
        return {"why": msgspec.json.decode(comparison, type=Comparison).why_not(value, path)}
    except InvalidTask as error:
        return {"error": str(error), "field": error.field}


def _scalar(value: Any) -> Any:
    """The Python number in an array or tensor of one element; another value unchanged."""
    item = getattr(value, "item", None)
    if callable(item) and not isinstance(value, type):
        with suppress(TypeError, ValueError, RuntimeError):
            return item()
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _same(found: Any, wanted: Any) -> bool:
    """Equality as in JSON: true is not 1, and a tuple is a list."""
    found = _scalar(found)
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, list | tuple) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(found, Mapping) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[key], part) for key, part in wanted.items())
    with suppress(TypeError, ValueError):  # an array compares item by item
        return bool(found == wanted)
    return False


def _shown(value: Any) -> str:
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):
        return f"of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
