"""What a running task says of itself: how far it is, and numbers such as a loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["HISTORY", "Progress", "advanced", "progress_fields", "progress_of", "progress_text", "read_line"]

HISTORY = 32
"""How many values of a number are kept. Beyond that, only every second, fourth, ... value is kept, and the newest."""
_MESSAGE_CHARS = 200
_NUMBERS = 20
_NAME_CHARS = 64


class Progress(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a task has said last, at `at` seconds since the epoch: that `step` of `of` is done, a message, and numbers.

    A number that is not finite is None. `history` holds values of each number, in order, evenly spread over the
    run, and the last: at most `HISTORY` of each. `counts` is how many values each number has had.
    """

    at: float
    step: int | float | None = None
    of: int | float | None = None
    message: str = ""
    numbers: dict[str, int | float | None] = {}
    history: dict[str, list[int | float | None]] = {}
    counts: dict[str, int] = {}

    def value_of(self, field: str) -> int | float | None:
        """The last value of a number, also of `step` and `of`. None where there is none, or no finite one."""
        return {"step": self.step, "of": self.of}.get(field, self.numbers.get(field))


def read_line(line: bytes, at: float) -> tuple[str, Progress]:
    """The uid that a line names, which may be empty, and the progress that it tells.

    A line is a JSON object: `step`, `of` and `message` as in `Progress`, and any further numbers. Another line is a
    message.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return "", Progress(at, message=_message(line.decode("utf-8", "replace").strip()))
    return _clean(str(fields.get("task") or "")), progress_of(fields, at)


def progress_of(fields: Mapping[str, Any], at: float) -> Progress:
    """The progress that the object of a line tells."""
    numbers = {_clean(name[:_NAME_CHARS]): _finite(value) for name, value in fields.items() if _is_number(value)}
    step, of = numbers.pop("step", None), numbers.pop("of", None)
    numbers.pop("message", None)
    numbers.pop("task", None)
    kept = dict(list(numbers.items())[:_NUMBERS])
    history = {name: [value] for name, value in kept.items()}
    message = _message(str(fields.get("message") or ""))
    return Progress(at, step, of, message, kept, history, dict.fromkeys(kept, 1))


def _message(text: str) -> str:
    return _clean(text[:_MESSAGE_CHARS])


def _clean(text: str) -> str:
    """Text that can be sent: without lone surrogates, as in names of files that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: float) -> int | float | None:
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    try:
        number = float(value)  # also of an int that is too large to be sent
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def advanced(earlier: Progress | None, later: Progress) -> Progress:
    """The progress after `later`: what it does not tell stays as it was."""
    if earlier is None:
        return later
    numbers = dict(list({**earlier.numbers, **later.numbers}.items())[:_NUMBERS])
    counts, history = dict(earlier.counts), dict(earlier.history)
    for name in numbers.keys() & later.numbers.keys():
        history[name] = _appended(history.get(name, []), counts.get(name, 0), numbers[name])
        counts[name] = counts.get(name, 0) + 1
    return Progress(
        later.at,
        earlier.step if later.step is None else later.step,
        earlier.of if later.of is None else later.of,
        later.message or earlier.message,
        numbers,
        history,
        counts,
    )


def _appended(kept: list[int | float | None], count: int, value: float | None) -> list[int | float | None]:
    """What is kept after one more value: `kept` is that of the `count` values before."""
    stride = _stride(count)
    spread = kept[: -(-count // stride)]  # without the newest, where it is there only as such
    if _stride(count + 1) > stride:
        spread = spread[::2]
    return [*spread, value]


def _stride(count: int) -> int:
    """Every how many values one is kept, of so many: a power of two, so that there is room for the newest."""
    stride = 1
    while -(-count // stride) > HISTORY - 1:
        stride *= 2
    return stride


def progress_text(progress: Progress) -> str:
    """As in `3 of 20, epoch 3, loss 0.4`."""
    steps = "" if progress.step is None else f"{progress.step:g}"
    steps += "" if progress.of is None else f" of {progress.of:g}"
    numbers = (f"{name} {'NaN' if value is None else f'{value:g}'}" for name, value in progress.numbers.items())
    return ", ".join(filter(None, [steps.strip(), progress.message, *numbers]))


def progress_fields(progress: Progress) -> Mapping[str, Any]:
    """The progress as plain data for replies, without times."""
    return {name: value for name, value in msgspec.to_builtins(progress).items() if name not in ("at", "counts")}
