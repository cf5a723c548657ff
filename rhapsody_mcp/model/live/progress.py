"""What a running task says of itself: how far it is, and numbers such as a loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["HISTORY", "Progress", "advanced", "progress_fields", "progress_of", "progress_text", "read_line"]

HISTORY = 32
"""How many values of a number are kept. Beyond that, every second value is dropped, and the newest stays."""
_MESSAGE_CHARS = 200
_NUMBERS = 20
_NAME_CHARS = 64


class Progress(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a task has said last, at `at` seconds since the epoch: that `step` of `of` is done, a message, and numbers.

    A number that is not finite is None. `history` holds earlier and last values of each number, in order, at most
    `HISTORY` of each, from the whole run.
    """

    at: float
    step: int | float | None = None
    of: int | float | None = None
    message: str = ""
    numbers: dict[str, int | float | None] = {}
    history: dict[str, list[int | float | None]] = {}

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
    kept = dict(list(numbers.items())[:_NUMBERS])
    history = {name: [value] for name, value in kept.items()}
    return Progress(at, step, of, _message(str(fields.get("message") or "")), kept, history)


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
    history = {name: _appended(earlier.history.get(name, []), later.history.get(name, [])) for name in numbers}
    return Progress(
        later.at,
        earlier.step if later.step is None else later.step,
        earlier.of if later.of is None else later.of,
        later.message or earlier.message,
        numbers,
        history,
    )


def _appended(values: list[int | float | None], more: list[int | float | None]) -> list[int | float | None]:
    values = [*values, *more]
    while len(values) > HISTORY:
        values = [*values[:-1:2], values[-1]]
    return values


def progress_text(progress: Progress) -> str:
    """As in `3 of 20, epoch 3, loss 0.4`."""
    steps = "" if progress.step is None else f"{progress.step:g}"
    steps += "" if progress.of is None else f" of {progress.of:g}"
    numbers = (f"{name} {'NaN' if value is None else f'{value:g}'}" for name, value in progress.numbers.items())
    return ", ".join(filter(None, [steps.strip(), progress.message, *numbers]))


def progress_fields(progress: Progress) -> Mapping[str, Any]:
    """The progress as plain data for replies, without times."""
    return {name: value for name, value in msgspec.to_builtins(progress).items() if name != "at"}
